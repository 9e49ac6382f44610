"""The page of `dgemma serve` for everybody: themes, keyboard, motion, contrast, narrow screens, large canvases."""

from __future__ import annotations

import json
from typing import Any

import pytest

import page_visits
from browser import expect, visiting
from page_visits import EASY, WATCH, ask, finished, put_puzzle, steady
from serving import Running

browser, sudoku, text = page_visits.browser, page_visits.sudoku, page_visits.text


def test_the_theme_follows_the_system_and_can_be_switched(browser: Any, sudoku: Running) -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    with visiting(browser, sudoku.url, color_scheme="dark") as page:
        switch = page.get_by_role("button", name="Dark")
        dark = page.evaluate(paper)
        assert switch.get_attribute("aria-pressed") == "true"
        switch.click()
        light = page.evaluate(paper)
        assert light != dark
        page.reload()
        assert page.evaluate(paper) == light
        switch.click()
        assert page.evaluate(paper) == dark
    with visiting(browser, sudoku.url, color_scheme="light") as page:
        assert page.evaluate(paper) == light


def test_everything_can_be_done_without_a_mouse(browser: Any, sudoku: Running) -> None:
    with visiting(browser, sudoku.url) as page:
        put_puzzle(page, EASY.text)
        steady(page)

        def tab_to(name: str, key: str = "Tab") -> None:
            for _ in range(30):
                page.keyboard.press(key)
                found = page.evaluate(
                    "() => { const one = document.activeElement; const style = getComputedStyle(one);"
                    " return [one.getAttribute('aria-label') ?? one.labels?.[0]?.textContent ?? one.textContent,"
                    " style.outlineStyle, parseFloat(style.outlineWidth)]; }"
                )
                assert found[1] != "none", f"{found[0]} does not show its focus"
                assert found[2] > 0
                if found[0] == name:
                    return
            pytest.fail(f"{name} cannot be reached")

        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.textContent") == "Skip to the content"
        tab_to("Solve")
        page.keyboard.press("Enter")
        expect(page.locator("#verdict")).to_contain_text("Solved")
        tab_to("Denoising step")
        page.keyboard.press("ArrowLeft")
        tab_to("Sudoku", "Shift+Tab")
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
        tab_to("Message")
        page.keyboard.type(EASY.text)
        page.keyboard.press("Enter")
        expect(page.locator(".message.model .text")).to_have_text(EASY.solution)
        tab_to("Settings", "Shift+Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Denoising steps")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_motion_is_left_out_where_it_is_not_wanted(browser: Any, sudoku: Running) -> None:
    with visiting(browser, sudoku.url, reduced_motion="reduce") as page:
        expect(page.locator(".cell.given").nth(5)).to_be_visible()
        assert page.evaluate("() => getComputedStyle(document.querySelector('.cell')).transitionDuration") == "0s"
        assert page.evaluate("() => new Answer({}, sudoku.timeline).pace") == 0
        assert page.evaluate("() => settings.pace()") > 0


# WCAG's contrast of every visible text against what lies behind it.
CONTRAST = """() => {
  const channels = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => channels(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (channels(colour)[3] === 255) return colour;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || element.disabled || !element.checkVisibility({ visibilityProperty: true })) continue;
    const colour = getComputedStyle(element).color;
    if (channels(colour)[3] === 0) continue;
    const [high, low] = [luminance(colour), luminance(behind(element))].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), `${element.className || element.tagName}: ${text.slice(0, 30)}`]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, browser: Any, sudoku: Running) -> None:
    with visiting(browser, sudoku.url, color_scheme=scheme, reduced_motion="reduce") as page:
        put_puzzle(page, EASY.text)
        steady(page)
        page.get_by_role("button", name="Solve").click()
        expect(page.locator("#verdict")).to_contain_text("Solved")
        # Every shade, with all that may lie on it.
        page.evaluate(
            "() => document.querySelectorAll('.cell').forEach((cell, place) => {"
            " cell.textContent = '5'; cell.className = `cell token level-${place % 8}` +"
            " [' accepted', ' noise', ' thought', ' end', ' after'][Math.floor(place / 8)]; })"
        )
        found = page.evaluate(CONTRAST)
        for path in ("chat", "edit"):
            page.get_by_role("tab", name=path.capitalize()).click()
            found += page.evaluate(CONTRAST)
        page.get_by_role("button", name="Settings").click()
        setting_error = "() => tell(new ServerError(401, ''))"
        page.evaluate(setting_error)
        found += page.evaluate(CONTRAST)
        assert len(found) > 90
        assert [name for ratio, name in found if ratio < 4.5] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(width: int, browser: Any, sudoku: Running) -> None:
    wide = (
        "() => Math.max(document.documentElement.scrollWidth, document.querySelector('main').scrollWidth) - innerWidth"
    )
    with visiting(browser, sudoku.url, viewport={"width": width, "height": 844}) as page:
        put_puzzle(page, EASY.text)
        steady(page)
        page.get_by_role("button", name="Solve").click()
        expect(page.locator("#verdict")).to_contain_text("Solved")
        assert page.evaluate(wide) <= 0
        page.get_by_role("tab", name="Chat").click()
        ask(page, "8" * 400)
        expect(page.locator("#view-chat dd").first).to_contain_text(" of ")
        assert page.evaluate(wide) <= 0
        page.get_by_role("tab", name="Edit").click()
        assert page.evaluate(wide) <= 0
        page.get_by_role("button", name="Settings").click()
        assert page.evaluate(wide) <= 0


def test_a_large_canvas_is_built_once(browser: Any, text: Running) -> None:
    """256 tokens and 48 steps, as the published model has them."""
    length, steps = 256, 48

    def draft(step: int) -> dict[str, Any]:
        tokens = [
            {"id": place, "text": f" w{place if place < step * 5 else place * step % 97}", "accepted": place < step * 5,
             "entropy": 0.0 if place < step * 5 else 2.0}
            for place in range(length)
        ]  # fmt: skip
        words = "".join(token["text"] for token in tokens)
        return {"type": "draft", "canvas_index": 0, "step": step, "max_denoising_steps": steps, "temperature": 0.5,
                "mean_entropy": 1 / step, "text": words, "thinking": "", "tokens": tokens}  # fmt: skip

    events = [("diffusion.draft", {"choices": [], "diffusion": draft(step)}) for step in range(1, steps + 1)]
    last = draft(steps)["text"]
    events += [("message", {"choices": [{"delta": {"content": last}, "finish_reason": "length"}]})]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events) + "data: [DONE]\n\n"
    with visiting(browser, text.url) as page:
        page.evaluate("() => { settings.pace = () => 20; }")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=body))
        page.evaluate(WATCH)
        ask(page, "hi")
        finished(page)
        seen = page.evaluate("() => ({ built: seen.built, changed: seen.changed, steps: seen.texts.size })")
        assert seen["built"] == length
        assert seen["steps"] == steps
        # A step changes the five tokens that it settles and the text of those that it has not: no more.
        assert seen["changed"] < 2 * length * steps
        assert page.locator(".message.model .text").inner_text() == last
        assert page.locator("#view-chat").get_by_role("slider").get_attribute("max") == str(steps - 1)


def test_a_bounded_history_is_kept(browser: Any, text: Running) -> None:
    with visiting(browser, text.url) as page:
        kept = page.evaluate(
            """() => {
              const frames = new Frames();
              const pieces = new Array(256).fill("a");
              for (let step = 0; step < 3000; step++) {
                frames.add({ canvas: Math.floor(step / 48), step: step % 48 + 1, kept: 256, pieces });
              }
              return [frames.list.length, frames.dropped, MOST_POSITIONS, frames.list.at(-1).perForward];
            }"""
        )
        count, dropped, most, rate = kept
        assert count == most // 256
        assert count + dropped == 3000
        assert rate == pytest.approx((63 * 256) / 3000)


def test_nothing_is_left_on_the_server(sudoku: Running, text: Running) -> None:
    for server in (sudoku, text):
        server.wait_until_empty()
