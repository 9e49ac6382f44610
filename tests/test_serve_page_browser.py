"""The page of `dgemma serve` in a browser: it chats, draws drafts, scrubs, edits and solves."""

from __future__ import annotations

import json
from typing import Any

import pytest

import page_visits
from browser import expect, visiting
from chats import answering
from dgemma_ext import demo
from page_visits import (
    EASY,
    PUZZLE,
    SIZE,
    WATCH,
    ask,
    digits,
    drafts_of,
    figures,
    finished,
    put_puzzle,
    setting,
    steady,
)
from serving import MODEL, Running, bundled, running

browser, sudoku, text = page_visits.browser, page_visits.sudoku, page_visits.text

CONSOLE_401, CONSOLE_400, CONSOLE_429 = (
    f"Failed to load resource: the server responded with a status of {s}" for s in (401, 400, 429)
)


# A chat ---------------------------------------------------------------------------------------------------------------


def test_a_chat_draws_its_drafts_and_goes_back_through_them(browser: Any, sudoku: Running) -> None:
    drafts, answer = drafts_of(sudoku, [{"role": "user", "content": PUZZLE.text}], seed=7)
    wanted = ["".join(token["text"] for token in draft["tokens"])[: SIZE * SIZE] for draft in drafts]
    assert len(drafts) > 2
    assert len(set(wanted)) > 1
    with visiting(browser, sudoku.url, "/#chat") as page:
        setting(page, seed=7, pace="100", entropy_bound=0.01)
        page.evaluate(WATCH)
        ask(page, PUZZLE.text)
        finished(page)
        seen = page.evaluate("() => ({ ...seen, texts: [...seen.texts] })")
        shown = dict.fromkeys(text[: SIZE * SIZE] for text in seen["texts"])
        assert list(shown) == list(dict.fromkeys(wanted))
        assert seen["built"] == SIZE * SIZE + 1, "the elements of a canvas are made once"
        assert seen["changed"] > 0
        assert seen["said"] == ["The model is writing.", answer], "drafts are not read out, the answer is"
        words = page.locator(".message.model .text")
        assert words.inner_text() == answer
        assert page.locator(".live[aria-hidden]").count() == 0

        view = page.locator("#view-chat .timeline")
        assert figures(view)["Step"] == f"{len(drafts)} of {len(drafts)}"
        slider = view.get_by_role("slider", name="Denoising step")
        slider.focus()
        page.keyboard.press("Home")
        for step, draft in enumerate(drafts, start=1):
            told = figures(view)
            assert told["Step"] == f"{step} of {len(drafts)}"
            assert float(told["Mean entropy"]) == pytest.approx(draft["mean_entropy"], abs=0.0006)
            assert float(told["Tokens per forward"]) == pytest.approx(SIZE * SIZE / step, abs=0.06)
            assert told["Time"].endswith(" s")
            spoken = slider.get_attribute("aria-valuetext")
            assert spoken.startswith(f"step {step} of {len(drafts)}, mean entropy {told['Mean entropy']}, ")
            if step < len(drafts):
                assert words.inner_text()[: SIZE * SIZE] == wanted[step - 1]
                accepted = page.locator(".canvas .accepted").count()
                assert accepted == sum(token["accepted"] for token in draft["tokens"][: SIZE * SIZE + 1])
            page.keyboard.press("ArrowRight")
        assert words.inner_text() == answer
        view.get_by_role("button", name="Replay").click()
        expect(view.locator("dd").first).to_have_text(f"{len(drafts)} of {len(drafts)}")


def test_markup_is_text(browser: Any, text: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    markup = '<img src="x" onerror="document.title = 1"><b>bold</b> &amp; <script>1</script>'
    answering(monkeypatch, f"{markup}<turn|>")
    with visiting(browser, text.url) as page:
        expect(page).to_have_title(f"{MODEL} · dgemma")
        setting(page, pace="0", max_denoising_steps=3)
        ask(page, markup)
        finished(page)
        assert page.locator(".message.user .words").inner_text() == markup
        assert page.locator(".message.model .text").inner_text() == markup
        page.locator("#view-chat").get_by_role("slider").focus()
        page.keyboard.press("Home")
        first = page.locator(".canvas").inner_text()
        assert len(first) > 20
        assert markup.startswith(first)
        assert page.locator("#log :is(img, b, script)").count() == 0
        assert page.title() == f"{MODEL} · dgemma"


def test_thoughts_are_folded_and_tools_answer(browser: Any, text: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<|tool_call>call:look{what:<|"|>the sky<|"|>}<tool_call|>'
    prompts = answering(
        monkeypatch,
        f"<|channel>thought\nLet me see.\n<channel|>One moment.{call}<|tool_response>",
        "It is blue.<turn|>",
    )
    tools = '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]'
    with visiting(browser, text.url) as page:
        setting(page, tools=tools, max_denoising_steps=2, system="Be brief.")
        ask(page, "What is there?")
        finished(page)
        first = page.locator(".message.model").first
        assert first.locator(".text").last.inner_text() == "One moment."
        thoughts = first.get_by_text("Let me see.")
        expect(thoughts).to_be_hidden()
        first.get_by_text("Thoughts").click()
        expect(thoughts).to_be_visible()
        card = first.get_by_role("region", name="Call of the tool look")
        assert json.loads(card.locator("pre").inner_text()) == {"what": "the sky"}
        card.get_by_label("What the tool gives").fill("blue")
        first.get_by_role("button", name="Send the result").click()
        expect(page.locator(".message.model .text").last).to_have_text("It is blue.")
        finished(page)
    tokenizer = text.service.tokenizer
    assert "Be brief." in tokenizer.decode(prompts[0])
    assert "blue" in tokenizer.decode(prompts[1])


def test_an_answer_by_a_schema_is_shown_parsed(browser: Any, sudoku: Running) -> None:
    schema = {
        "type": "object",
        "properties": {
            "solved": {"type": "boolean"},
            "rows": {
                "type": "array",
                "items": {"type": "string", "pattern": "^[1-6]{2}$"},
                "minItems": 2,
                "maxItems": 2,
            },
            "left": {"enum": [None]},
        },
        "required": ["solved", "rows", "left"],
    }
    with visiting(browser, sudoku.url, "/#chat", errors=(CONSOLE_400,)) as page:
        steady(page)
        setting(page, max_tokens=90, max_denoising_steps=3)
        page.get_by_role("button", name="Settings").focus()
        page.keyboard.press("Enter")
        field = page.get_by_label("Answers of the chat match this JSON schema")
        field.focus()
        page.keyboard.insert_text("{")
        expect(field).to_have_attribute("aria-invalid", "true")
        ask(page, "1.3.5.")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("the schema in the settings is not JSON")
        field.fill('{"not": {}}')
        expect(field).to_have_attribute("aria-invalid", "false")
        page.get_by_label("Message", exact=True).focus()
        page.keyboard.press("Enter")
        expect(alert).to_contain_text("response_format")
        expect(alert).to_contain_text("not")
        field.fill(json.dumps(schema))
        page.get_by_label("Message", exact=True).focus()
        with page.expect_request("**/v1/chat/completions") as asked:
            page.keyboard.press("Enter")
        assert asked.value.post_data_json["response_format"]["json_schema"]["schema"] == schema
        finished(page)
        parsed = page.get_by_role("region", name="The answer, parsed")
        answer = json.loads(page.locator(".message.model .text").inner_text())
        assert parsed.locator("dt").all_inner_texts() == ["solved", "rows", "left"]
        assert parsed.locator("dd > .value").all_inner_texts() == [json.dumps(answer["solved"]), "null"]
        assert parsed.get_by_role("listitem").all_inner_texts() == answer["rows"]
        field.fill("")
        ask(page, EASY.text)
        finished(page)
        assert parsed.count() == 1, "an answer without a schema is shown as it is"


def test_an_answer_can_be_stopped(browser: Any, text: Running) -> None:
    with visiting(browser, text.url) as page:
        setting(page, pace="2000", max_tokens=900)
        ask(page, "hi")
        expect(page.locator("#view-chat dd").first).to_have_text("1 of 48")
        page.keyboard.press("Escape")
        expect(page.get_by_text("Stopped; this is a draft.")).to_be_visible()
        finished(page)
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_text("Ask something")).to_be_visible()
    text.wait_until_empty()


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for(browser: Any) -> None:
    with (
        running(bundled(SIZE), api_key="a key") as server,
        visiting(browser, server.url, errors=(CONSOLE_401,)) as page,
    ):
        expect(page.get_by_role("alert")).to_contain_text("This server wants a key.")
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("does not know this key")
        field.fill("a key")
        page.keyboard.press("Enter")
        expect(page.locator(".cell.given").nth(5)).to_be_visible()
        page.reload()
        expect(page.locator(".cell.given").nth(5)).to_be_visible()


def test_errors_are_told_in_words(browser: Any, sudoku: Running) -> None:
    with visiting(
        browser, sudoku.url, "/#chat", errors=(CONSOLE_400, CONSOLE_429, "Failed to load resource: net::")
    ) as page:
        alert = page.get_by_role("alert")
        steady(page)
        setting(page, temperature=9)
        ask(page, EASY.text)
        expect(alert).to_contain_text("temperature")
        expect(alert).to_contain_text("The server cannot use this request")
        assert page.get_by_label("Message", exact=True).input_value() == EASY.text, "what was written is not lost"
        setting(page, temperature="hot")
        ask(page, EASY.text)
        expect(alert).to_contain_text("Temperature must be a number")
        setting(page, temperature="")

        busy = {"error": {"message": "too many", "type": "rate_limit_error", "param": None, "code": None}}
        answer = {"status": 429, "headers": {"retry-after": "7"}, "json": busy}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer), times=1)
        ask(page, EASY.text)
        expect(alert).to_contain_text("its queue is full. It asks for 7 seconds of patience.")
        page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
        page.get_by_role("button", name="Try again").click()
        expect(alert).to_contain_text("The server cannot be reached.")
        torn = 'data: {"choices": [{"delta": {"content": "be"}}]}\n\n'
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=torn), times=1)
        page.get_by_role("button", name="Try again").click()
        expect(alert).to_contain_text("The connection ended before the answer did.")
        page.get_by_role("button", name="Try again").click()
        finished(page)
        expect(alert).to_be_hidden()
        expect(page.locator(".message.model .text")).to_have_text(EASY.solution)


# Sudoku ---------------------------------------------------------------------------------------------------------------


def test_a_board_solves_itself(browser: Any, sudoku: Running) -> None:
    with visiting(browser, sudoku.url) as page:
        setting(page, seed=1, pace="100")
        put_puzzle(page, PUZZLE.text)
        expect(page.locator("#verdict")).to_contain_text("one solution")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Solve").click()
        parts = asked.value.post_data_json["diffusion"]["start_text"]
        spelled = "".join(part.get("text") or "." * part["blank"] for part in parts)
        assert spelled == PUZZLE.text
        assert all(part["pinned"] for part in parts if "text" in part)
        verdict = page.locator("#verdict")
        expect(verdict).to_contain_text("Solved: every row, column and box is right.")
        assert demo.check(digits(page), PUZZLE.text)

        page.locator("#view-sudoku").get_by_role("slider").focus()
        page.keyboard.press("Home")
        assert figures(page.locator("#view-sudoku"))["Step"].startswith("1 of ")
        givens = page.locator(".cell.given")
        assert givens.count() == PUZZLE.clues
        weight = "(cell) => getComputedStyle(cell).fontWeight"
        assert givens.first.evaluate(weight) == "700"
        unsure = page.locator(".cell:is(.level-4, .level-5, .level-6, .level-7)")
        assert unsure.count() > 0
        assert unsure.first.evaluate(weight) == "400"
        page.keyboard.press("End")
        assert demo.check(digits(page), PUZZLE.text)


def test_a_board_is_edited_by_keyboard_and_impossible_ones_are_told(browser: Any, sudoku: Running) -> None:
    with visiting(browser, sudoku.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        expect(page.locator(".cell.given").nth(5)).to_be_visible()
        setting(page, pace="0")
        verdict = page.locator("#verdict")
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("gridcell").first.focus()
        page.keyboard.press("5")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("7")  # there is no such digit in a grid of six
        page.keyboard.press("5")
        expect(verdict).to_have_text("Impossible: row 1 has two 5s. The model can only guess.")
        assert page.locator(".cell.wrong").count() == 2
        assert (
            page.get_by_role("gridcell").nth(2).get_attribute("aria-label") == "Row 1, column 3: 5, given, in conflict"
        )
        page.keyboard.press("Backspace")
        expect(verdict).to_have_text(f"{SIZE * SIZE - 1} blanks, more than one solution.")
        # 1 to 5 in a row, and 6 in the column of its last cell.
        put = dict(enumerate("12345")) | {2 * SIZE + 5: "6"}
        page.evaluate("(cells) => sudoku.fill(cells)", [put.get(cell, "") for cell in range(SIZE * SIZE)])
        expect(verdict).to_have_text("Impossible: no digits fit into all blanks. The model can only guess.")
        page.get_by_role("button", name="Solve").click()
        expect(verdict).to_contain_text("Wrong: ")

        page.evaluate("(text) => navigator.clipboard.writeText(text)", PUZZLE.text)
        page.get_by_role("gridcell").first.focus()
        page.keyboard.press("Control+v")
        expect(verdict).to_have_text(f"{SIZE * SIZE - PUZZLE.clues} blanks, one solution.")
        assert digits(page) == PUZZLE.text.replace(".", "")


@pytest.mark.parametrize("size", [6, 9])
def test_the_pages_rules_are_the_packages(size: int, browser: Any, sudoku: Running) -> None:
    count = "([size, cells]) => { const board = new Board(size); board.cells = cells; return board.solutions(); }"
    rules = "(size) => new Board(size).units.map((unit) => unit.cells)"
    with visiting(browser, sudoku.url) as page:
        assert page.evaluate(rules, size) == demo.puzzles.units(size)
        for seed in range(2):
            puzzle = demo.draw(size, seed)
            cells = [digit.strip(".") for digit in puzzle.text]
            assert page.evaluate(count, [size, cells]) == 1
            other = cells.index("")
            for digit in map(str, range(1, size + 1)):
                cells[other] = digit
                assert page.evaluate(count, [size, cells]) == int(digit == puzzle.solution[other])


# Editing --------------------------------------------------------------------------------------------------------------


def test_the_rest_of_a_text_stays(browser: Any, text: Running) -> None:
    before, middle, after = "The sky is ", "green", " today, I think."
    with visiting(browser, text.url, "/#edit") as page:
        setting(page, max_denoising_steps=4, pace="100", seed=3)
        document = page.get_by_label("Text", exact=True)
        document.fill(before + middle + after)
        document.evaluate("(field, [a, b]) => field.setSelectionRange(a, b)", [len(before), len(before + middle)])
        expect(page.locator("#selection")).to_have_text(
            f"5 characters selected; {len(before + after)} characters pinned."
        )
        page.get_by_label("Instruction").fill("Another colour.")
        page.get_by_label("Room").fill("4")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Rewrite the selection").click()
        body = asked.value.post_data_json
        parts = [{"text": before, "pinned": True}, {"blank": 4}, {"text": after, "pinned": True}]
        assert body["diffusion"]["start_text"] == parts
        assert "Another colour." in body["messages"][0]["content"]
        expect(page.get_by_role("button", name="Rewrite the selection")).to_be_visible()
        written = document.input_value()
        assert written.startswith(before)
        assert written.endswith(after)
        assert written != before + middle + after
        page.locator("#view-edit").get_by_role("slider").focus()
        page.keyboard.press("Home")
        pinned = page.locator("#backdrop .pinned")
        assert "".join(pinned.all_inner_texts()) == before + after
        assert pinned.first.evaluate("(token) => getComputedStyle(token).fontWeight") == "700"
        page.get_by_role("button", name="Undo").click()
        assert document.input_value() == before + middle + after

        page.get_by_label("Stay close").check()
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Rewrite the selection").click()
        diffusion = asked.value.post_data_json["diffusion"]
        assert (diffusion["start_text"][1], diffusion["start_step"]) == ({"text": middle}, 2)
        expect(page.get_by_role("button", name="Rewrite the selection")).to_be_visible()


def test_a_model_fills_in_what_was_selected(browser: Any, sudoku: Running) -> None:
    with visiting(browser, sudoku.url, "/#edit") as page:
        document = page.get_by_label("Text", exact=True)
        expect(document).not_to_have_value("")
        document.fill(PUZZLE.solution)
        setting(page, seed=0, pace="0")
        document.focus()
        page.keyboard.press("Control+Home")
        for _ in range(SIZE):
            page.keyboard.press("ArrowRight")
        for _ in range(SIZE - 1):
            page.keyboard.press("Shift+ArrowRight")
        page.get_by_role("button", name="Rewrite the selection").click()
        expect(page.locator("#edit-timeline dd").first).to_contain_text(" of ")
        expect(page.get_by_role("button", name="Undo")).to_be_enabled()
        assert document.input_value() == PUZZLE.solution


def test_nothing_is_left_on_the_server(sudoku: Running, text: Running) -> None:
    for server in (sudoku, text):
        server.wait_until_empty()
