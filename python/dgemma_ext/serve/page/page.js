// The page of `dgemma serve`. Text that comes from people or from the model is put in by textContent alone.
//
// In this order: elements and words, the server, frames (the drafts that are kept), pictures of frames, the timeline,
// settings, one answer, and the three views: Sudoku, chat, edit. Images of messages are in pictures.js.
"use strict";

// Elements and words ------------------------------------------------------------------------------------------------

const at = (id) => document.getElementById(id);

/** An element with properties, listeners (`onclick`), attributes (`aria-…`, `role`, `for`) and children. */
function make(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

const prefersStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const fixed = (number, digits) => (Number.isFinite(number) ? number.toFixed(digits) : "–");

/** Tells something to screen readers. */
function say(text) {
  at("status").textContent = text;
}

// The server --------------------------------------------------------------------------------------------------------

/** What the server said instead of an answer. status: 0 where it said nothing. */
class ServerError extends Error {
  constructor(status, message, param = null, wait = null) {
    super(message);
    Object.assign(this, { status, param, wait });
  }
}

const KEY = "dgemma.key";
let key = sessionStorage.getItem(KEY) ?? "";

async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().then((answer) => answer.error ?? {}, () => ({}));
  const wait = Number(response.headers.get("retry-after")) || null;
  throw new ServerError(response.status, told.message ?? response.statusText, told.param ?? null, wait);
}

/** Server-sent events of a response as {name, data}. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      let name = "message";
      const data = [];
      for (const line of event.split(/\r?\n/)) {
        if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
      if (data.length) yield { name, data: data.join("\n") };
    }
  }
}

// Of errors that come in a stream, whose own status was sent before.
const STATUSES = { invalid_request_error: 400, authentication_error: 401, rate_limit_error: 429 };

/** An error in words: what happened, and what can be done. */
function inWords(error) {
  const said = error.message.replace(/\.$/, "");
  const field = error.param ? ` It is about “${error.param}”.` : "";
  switch (error.status) {
    case 0:
      return said.endsWith("reached") ? `${said}. Is it still running?` : `${said}.`;
    case 400:
    case 422:
      return `The server cannot use this request: ${said}.${field}`;
    case 401:
      return key ? "The server does not know this key." : "This server wants a key.";
    case 404:
      return `The server does not have this: ${said}.`;
    case 413:
      return "The text is too long for this server, or an image too large.";
    case 429:
      return `The server is busy, and its queue is full.${error.wait ? ` It asks for ${plural(error.wait, "second")} of patience.` : ""}`;
    case 503:
      return `The server cannot answer now: ${said}.`;
    default:
      return `The server failed (${error.status}): ${said}.`;
  }
}

const notice = { retry: null, focused: null };

/** Shows an error in words, with a field for the key where one is missing; `retry` does again what has failed. */
function tell(error, retry) {
  if (!(error instanceof ServerError)) console.error(error);
  notice.retry = retry ?? null;
  notice.focused = document.activeElement;
  at("notice-text").textContent = error instanceof ServerError ? inWords(error) : `The page failed: ${error.message}`;
  at("key-form").hidden = error.status !== 401;
  at("notice-retry").hidden = !retry || ![0, 429, 503].includes(error.status);
  at("notice").hidden = false;
  if (error.status === 401) at("key").focus();
}

function hideNotice() {
  if (at("notice").hidden) return;
  at("notice").hidden = true;
  notice.focused?.focus();
}

// Frames ------------------------------------------------------------------------------------------------------------

// Of an answer at most so many positions are kept, about 8 MB: 48 steps of 256 tokens twenty times over. Then the
// oldest frames go. The curve is drawn anew at each, so their number has a bound too.
const MOST_POSITIONS = 250_000;
const MOST_FRAMES = 2_000;
const ACCEPTED = 1, PINNED = 2, END = 4, AFTER = 8, THOUGHT = 16;
const MARKERS = new Set(["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>', "<pad>"]);

/** A draft in few bytes. before: the answer in front of its canvas; inThought: whether a thought was open there. */
function frameOf(draft, seconds, before, inThought) {
  const length = draft.tokens.length;
  const frame = {
    canvas: draft.canvas_index,
    step: draft.step,
    steps: draft.max_denoising_steps,
    mean: draft.mean_entropy,
    text: draft.text,
    seconds,
    before,
    pieces: new Array(length),
    entropy: new Float32Array(length),
    flags: new Uint8Array(length),
    kept: draft.end, // tokens of the answer, without the one that ends it
    accepted: 0,
    free: 0,
    endsInThought: inThought,
  };
  let thinks = inThought;
  for (let place = 0; place < length; place++) {
    const token = draft.tokens[place];
    const isMarker = MARKERS.has(token.text);
    let flags = (token.accepted ? ACCEPTED : 0) | (token.pinned ? PINNED : 0);
    if (!token.pinned) {
      frame.free++;
      if (token.accepted) frame.accepted++;
    }
    if (place >= draft.end || token.text === "<pad>") flags |= AFTER;
    else if (token.ends) {
      flags |= END;
      frame.kept = place;
    } else if (token.text === "<|channel>") thinks = true;
    if (thinks || (isMarker && !(flags & END))) flags |= THOUGHT;
    if (token.text === "<channel|>") thinks = false;
    frame.pieces[place] = token.text;
    frame.entropy[place] = token.entropy;
    frame.flags[place] = flags;
  }
  frame.endsInThought = thinks;
  return frame;
}

/** The frames of one answer, the newest last. */
class Frames {
  constructor() {
    this.clear();
  }

  clear() {
    this.list = [];
    this.dropped = 0;
    this.earlier = { tokens: 0, steps: 0 }; // of canvases before the newest
    this.positions = 0;
  }

  add(frame) {
    const last = this.list.at(-1);
    if (last && last.canvas !== frame.canvas) {
      this.earlier = { tokens: this.earlier.tokens + last.kept, steps: this.earlier.steps + last.step };
    }
    frame.perForward = (this.earlier.tokens + frame.kept) / (this.earlier.steps + frame.step);
    this.list.push(frame);
    this.positions += frame.pieces.length;
    while ((this.positions > MOST_POSITIONS || this.list.length > MOST_FRAMES) && this.list.length > 1) {
      this.positions -= this.list.shift().pieces.length;
      this.dropped++;
    }
  }
}

// Pictures of frames ------------------------------------------------------------------------------------------------

// In nats, a factor of about three apart, as the command's own colours are.
const BOUNDS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0];

function levelOf(entropy) {
  let level = 0;
  while (level < BOUNDS.length && entropy >= BOUNDS[level]) level++;
  return level;
}

function classOf(frame, place) {
  const flags = frame.flags[place];
  if (flags & AFTER) return "token after";
  if (flags & PINNED) return "token pinned";
  const names = `token level-${levelOf(frame.entropy[place])}`;
  return names + (flags & ACCEPTED ? " accepted" : "") + (flags & END ? " end" : "") + (flags & THOUGHT ? " thought" : "");
}

function pieceOf(frame, place) {
  const flags = frame.flags[place];
  if (flags & END) return "■";
  if (flags & AFTER) return "·";
  return frame.pieces[place];
}

/** A frame as running text. Its elements are made once; a step changes those that differ. */
class Canvas {
  constructor(home) {
    this.home = home;
    this.before = make("span");
    this.body = make("span", { className: "canvas" });
    this.spans = [];
    this.shown = 0;
    home.replaceChildren(this.before, this.body);
  }

  draw(frame) {
    if (this.before.textContent !== frame.before) this.before.textContent = frame.before;
    const length = frame.pieces.length;
    while (this.spans.length < length) {
      const span = make("span");
      this.spans.push({ span, node: span.appendChild(document.createTextNode("")), text: "", name: "" });
    }
    if (this.shown !== length) {
      this.body.replaceChildren(...this.spans.slice(0, length).map(({ span }) => span));
      this.shown = length;
    }
    for (let place = 0; place < length; place++) {
      const cell = this.spans[place];
      const text = pieceOf(frame, place);
      const name = classOf(frame, place);
      if (cell.text !== text) cell.node.data = cell.text = text;
      if (cell.name !== name) cell.span.className = cell.name = name;
    }
  }

  /** Ends with plain text. */
  settle(text) {
    this.before.textContent = text;
    this.body.replaceChildren();
    this.shown = 0;
  }
}

/** What the colours and letters of a draft mean. */
function legend() {
  const swatches = make("span", { className: "swatches" });
  for (let level = BOUNDS.length; level >= 0; level--) swatches.append(make("span", { className: `swatch level-${level}` }));
  return make(
    "p", { className: "legend" },
    make("span", {}, "unsure ", swatches, " sure"),
    make("span", {}, make("span", { className: "token accepted", textContent: "kept" })),
    make("span", {}, make("span", { className: "token pinned", textContent: "pinned" })),
  );
}

// The timeline ------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const CHART = { width: 400, height: 56 };

/** A slider over the frames of an answer, with their figures and the curve of their mean entropy. */
class Timeline {
  constructor(draw) {
    this.frames = new Frames();
    this.draw = draw;
    this.index = -1;
    this.isRunning = false;
    this.timer = null;
    this.slider = make("input", { type: "range", min: 0, max: 1, value: 0, "aria-label": "Denoising step" });
    this.slider.addEventListener("input", () => {
      this.pause();
      this.show(Number(this.slider.value));
    });
    this.play = make("button", { type: "button", className: "quiet play", textContent: "Replay" });
    this.play.addEventListener("click", () => (this.timer === null ? this.replay() : this.pause()));
    this.figures = make("dl", { className: "figures" });
    this.values = {};
    for (const [name, label] of [["step", "Step"], ["mean", "Mean entropy"], ["rate", "Tokens per forward"], ["time", "Time"]]) {
      this.values[name] = make("dd", { textContent: "–" });
      this.figures.append(make("div", {}, make("dt", { textContent: label }), this.values[name]));
    }
    this.line = document.createElementNS(SVG, "polyline");
    this.dot = document.createElementNS(SVG, "circle");
    this.dot.setAttribute("r", "4");
    const chart = document.createElementNS(SVG, "svg");
    chart.setAttribute("viewBox", `0 -4 ${CHART.width} ${CHART.height + 8}`);
    chart.setAttribute("preserveAspectRatio", "none");
    chart.setAttribute("class", "chart");
    chart.setAttribute("aria-hidden", "true");
    chart.append(this.line);
    const dots = document.createElementNS(SVG, "svg");
    dots.setAttribute("class", "chart-dot");
    dots.setAttribute("aria-hidden", "true");
    dots.append(this.dot);
    const scrub = make("div", { className: "scrub" }, make("div", { className: "curve" }, chart, dots), this.slider);
    this.element = make("div", { className: "timeline", role: "group", "aria-label": "Steps of the last answer", hidden: true });
    this.element.append(make("div", { className: "scrub-row" }, scrub, this.play), this.figures, legend());
    this.gone = make("p", { className: "hint", hidden: true });
    this.element.append(this.gone);
  }

  begin() {
    this.pause();
    this.frames.clear();
    this.index = -1;
    this.element.hidden = false;
    this.isRunning = true;
    this.slider.disabled = this.play.disabled = true;
    for (const value of Object.values(this.values)) value.textContent = "–";
    this.line.setAttribute("points", "");
    this.dot.setAttribute("visibility", "hidden");
  }

  add(frame) {
    this.frames.add(frame);
  }

  end(finished) {
    const count = this.frames.list.length;
    this.isRunning = false;
    this.element.hidden = count === 0;
    this.slider.disabled = this.play.disabled = count === 0;
    if (count) this.show(count - 1, false);
    if (count && finished?.perForward) this.values.rate.textContent = fixed(finished.perForward, 1);
  }

  show(index, draws = true) {
    const { list, dropped } = this.frames;
    const frame = list[index];
    if (!frame) return;
    this.index = index;
    // While an answer is under way, what has come but was not shown yet is not told.
    const known = this.isRunning ? list.slice(0, index + 1) : list;
    this.slider.max = Math.max(1, known.length - 1);
    this.slider.value = index;
    const canvas = list.at(-1).canvas > 0 || frame.canvas > 0 ? ` · canvas ${frame.canvas + 1}` : "";
    this.values.step.textContent = `${frame.step} of ${this.lastStep(frame, index)}${canvas}`;
    this.values.mean.textContent = fixed(frame.mean, 3);
    this.values.rate.textContent = fixed(frame.perForward, 1);
    this.values.time.textContent = `${fixed(frame.seconds, 2)} s`;
    this.slider.setAttribute(
      "aria-valuetext",
      `step ${this.values.step.textContent}, mean entropy ${fixed(frame.mean, 3)}, ${fixed(frame.perForward, 1)} tokens per forward, ${fixed(frame.seconds, 2)} seconds`,
    );
    this.gone.hidden = !dropped;
    this.gone.textContent = `Of a long answer the newest steps are kept; the first ${dropped} are gone.`;
    this.chart(known, index);
    if (draws) this.draw(frame, index === list.length - 1);
  }

  /** The last step of the frame's canvas once it is known, until then the most that it may take. */
  lastStep(frame, index) {
    const { list } = this.frames;
    if (this.isRunning) return frame.steps;
    let last = index;
    while (list[last + 1]?.canvas === frame.canvas) last++;
    return list[last].step;
  }

  chart(list, index) {
    const most = Math.max(...list.map((frame) => frame.mean), 1e-6);
    const across = Math.max(1, list.length - 1);
    const high = (frame) => 1 - Math.sqrt(Math.max(0, frame.mean) / most);
    this.line.setAttribute(
      "points",
      list.map((frame, place) => `${((place / across) * CHART.width).toFixed(1)},${(high(frame) * CHART.height).toFixed(1)}`).join(" "),
    );
    this.dot.setAttribute("visibility", "visible");
    this.dot.setAttribute("cx", `${(index / across) * 100}%`);
    this.dot.setAttribute("cy", `${(high(list[index]) * CHART.height + 4) / (CHART.height + 8) * 100}%`);
  }

  replay() {
    this.play.textContent = "Pause";
    const pace = Math.max(settings.pace(), prefersStill() ? 600 : 60);
    let index = 0;
    const next = () => {
      this.show(index);
      index++;
      if (index >= this.frames.list.length) this.pause();
      else this.timer = setTimeout(next, pace);
    };
    this.timer = 0;
    next();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.play.textContent = "Replay";
  }
}

// Settings ----------------------------------------------------------------------------------------------------------

const FIELDS = [
  { name: "max_denoising_steps", label: "Denoising steps", kind: "count", of: "diffusion" },
  { name: "entropy_bound", label: "Entropy bound", kind: "number", of: "diffusion" },
  { name: "canvas_length", label: "Canvas, tokens", kind: "count", of: "diffusion" },
  { name: "temperature", label: "Temperature", kind: "number", usual: "1" },
  { name: "seed", label: "Seed", kind: "count", usual: "random" },
  { name: "max_tokens", label: "Most tokens", kind: "count", usual: "what fits" },
];

const settings = {
  model: null,
  fields: {},

  build() {
    const form = at("settings-form");
    for (const field of FIELDS) {
      const input = make("input", { id: `set-${field.name}`, inputMode: field.kind === "count" ? "numeric" : "decimal", autocomplete: "off" });
      input.placeholder = field.usual ?? "";
      input.addEventListener("input", () => input.setAttribute("aria-invalid", String(this.valueOf(field) === undefined)));
      this.fields[field.name] = input;
      form.append(make("div", { className: "field" }, make("label", { htmlFor: input.id, textContent: field.label }), input));
    }
    const select = (id, label, choices) => {
      const chosen = make("select", { id }, ...choices.map(([value, text]) => make("option", { value, textContent: text })));
      form.append(make("div", { className: "field" }, make("label", { htmlFor: id, textContent: label }), chosen));
      return chosen;
    };
    this.thinking = select("set-thinking", "Thinking", [["", "as usual"], ["on", "on"], ["off", "off"]]);
    this.speed = select("set-pace", "Show a step for", [["0", "no time"], ["100", "0.1 s"], ["300", "0.3 s"], ["700", "0.7 s"], ["2000", "2 s"]]);
    const area = (id, label, placeholder) => {
      const input = make("textarea", { id, rows: 3, placeholder, spellcheck: false });
      form.append(make("div", { className: "field wide" }, make("label", { htmlFor: id, textContent: label }), input));
      return input;
    };
    this.system = area("set-system", "System message", "");
    this.tools = area("set-tools", "Tools, as a JSON list", '[{"type": "function", "function": {"name": …}}]');
    this.schema = area("set-schema", "Answers of the chat match this JSON schema", '{"type": "object", "properties": {…}}');
    for (const field of [this.tools, this.schema]) {
      field.addEventListener("input", () => field.setAttribute("aria-invalid", String(!isJson(field.value.trim() || "null"))));
    }
    form.addEventListener("submit", (event) => event.preventDefault());
  },

  /** Takes the defaults of the model that is served. */
  describe(model) {
    this.model = model;
    at("model").textContent = model.id;
    document.title = `${model.id} · dgemma`;
    for (const field of FIELDS) {
      const value = model.diffusion?.[field.name];
      if (value !== undefined) this.fields[field.name].placeholder = String(value);
    }
  },

  /** A field's number, null where it is empty, undefined where it is no number. */
  valueOf({ name, kind }) {
    const text = this.fields[name].value.trim();
    if (!text) return null;
    const value = Number(text);
    return Number.isFinite(value) && value >= 0 && (kind !== "count" || Number.isInteger(value)) ? value : undefined;
  },

  pace() {
    return Number(this.speed.value);
  },

  canvasLength() {
    return this.valueOf(FIELDS[2]) ?? this.model?.diffusion?.canvas_length ?? 256;
  },

  /** The body of a request for `messages`; raises ServerError for a field that cannot be sent. */
  body(messages, diffusion = {}) {
    const body = { model: this.model?.id, messages, stream: true, stream_options: { include_usage: true } };
    body.diffusion = { drafts: true };
    for (const field of FIELDS) {
      const value = this.valueOf(field);
      if (value === undefined) {
        const kind = field.kind === "count" ? "a whole number" : "a number";
        throw new ServerError(400, `${field.label} must be ${kind} that is not negative`, field.name);
      }
      if (value !== null) (field.of ? body[field.of] : body)[field.name] = value;
    }
    Object.assign(body.diffusion, diffusion);
    if (this.thinking.value) body.chat_template_kwargs = { enable_thinking: this.thinking.value === "on" };
    return body;
  },

  systemMessages() {
    return this.system.value.trim() ? [{ role: "system", content: this.system.value.trim() }] : [];
  },

  /** What a chat's request says besides: its tools, and what the answer matches. Raises ServerError for what is no JSON. */
  ofChat() {
    const read = (field, name, what) => {
      try {
        return JSON.parse(field.value);
      } catch (error) {
        throw new ServerError(400, `${what} in the settings is not JSON (${error.message})`, name);
      }
    };
    const body = {};
    if (this.tools.value.trim()) body.tools = read(this.tools, "tools", "the list of tools");
    if (this.schema.value.trim()) {
      const schema = read(this.schema, "response_format", "the schema");
      body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
    }
    return body;
  },
};

// One answer --------------------------------------------------------------------------------------------------------

/** The answer that is under way; there is one at a time. */
let running = null;

/**
 * Asks for an answer and shows its drafts on a timeline, each for a while at least.
 *
 * onCommit(answer) is called where a canvas is finished, after its drafts were shown. isEnough(text) tells whether no
 * more of it is wanted. `stop` ends it with what there is, or shows the rest at once where all has come.
 */
class Answer {
  constructor(body, timeline, { onCommit = () => {}, isEnough = () => false } = {}) {
    this.isEnough = isEnough;
    this.body = body;
    this.timeline = timeline;
    this.onCommit = onCommit;
    this.text = "";
    this.thinking = "";
    this.calls = [];
    this.reason = null;
    this.usage = null;
    this.isStopped = false;
    this.abort = new AbortController();
    this.queue = []; // frames and commits that wait to be shown
    this.timer = null;
    this.frameRequest = null;
    this.lastShown = -Infinity;
  }

  get draft() {
    return this.timeline.frames.list.at(-1)?.text ?? "";
  }

  async run() {
    running = this;
    this.timeline.begin();
    const began = performance.now();
    try {
      const response = await ask("v1/chat/completions", { body: this.body, signal: this.abort.signal });
      await this.read(response, began);
      this.seconds = (performance.now() - began) / 1000;
      await this.shown();
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.isStopped = true;
    } finally {
      this.flush();
      if (running === this) running = null;
      this.timeline.end({ perForward: this.usage?.diffusion?.tokens_per_forward });
    }
    return this;
  }

  stop() {
    if (this.hurry) return this.hurry();
    this.isStopped = true;
    this.abort.abort();
  }

  async read(response, began) {
    let inThought = false;
    let newest = null;
    let isWhole = false;
    for await (const { name, data } of eventsOf(response)) {
      if (data === "[DONE]") {
        isWhole = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(STATUSES[chunk.error.type] ?? 503, chunk.error.message, chunk.error.param);
      if (name === "diffusion.draft" || (chunk.diffusion && !chunk.usage)) {
        const draft = chunk.diffusion ?? chunk;
        if (newest && newest.canvas !== draft.canvas_index) inThought = newest.endsInThought;
        newest = frameOf(draft, (performance.now() - began) / 1000, this.text, inThought);
        this.timeline.add(newest);
        this.push({ index: this.timeline.frames.list.length + this.timeline.frames.dropped - 1 });
        continue;
      }
      this.usage = chunk.usage ?? this.usage;
      const choice = chunk.choices?.[0];
      if (choice) this.take(choice);
      if (this.isEnough(this.text)) {
        this.abort.abort();
        return;
      }
    }
    if (!isWhole && !this.isStopped) throw new ServerError(0, "The connection ended before the answer did.");
  }

  take({ delta = {}, finish_reason: reason }) {
    if (delta.reasoning_content) this.thinking += delta.reasoning_content;
    if (delta.content) this.text += delta.content;
    for (const call of delta.tool_calls ?? []) {
      const known = (this.calls[call.index ?? this.calls.length] ??= { id: call.id, name: "", arguments: "" });
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    if (reason) this.reason = reason;
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.push({ commit: { text: this.text, thinking: this.thinking } });
    }
  }

  push(item) {
    this.queue.push(item);
    this.schedule();
  }

  get pace() {
    return prefersStill() || document.hidden || this.isStopped ? 0 : settings.pace();
  }

  schedule() {
    if (this.timer !== null || this.frameRequest !== null) return;
    if (this.pace === 0 && !document.hidden) this.frameRequest = requestAnimationFrame(() => this.flush());
    else this.timer = setTimeout(() => this.advance(), Math.max(0, this.lastShown + this.pace - performance.now()));
  }

  /** Shows the next frame, or puts the text in place of the last one. */
  advance() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.pace === 0) return this.flush();
    const item = this.queue.shift();
    if (item) this.showItem(item);
    if (this.queue.length) this.schedule();
    else this.emptied?.();
  }

  /** Shows the newest frame, and everything that was committed. */
  flush() {
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frameRequest);
    this.timer = this.frameRequest = null;
    const newest = this.queue.findLastIndex((item) => !item.commit);
    this.queue.splice(0).forEach((item, place) => (item.commit || place === newest) && this.showItem(item));
    this.emptied?.();
  }

  showItem({ commit, index }) {
    if (commit) this.onCommit(commit);
    else {
      this.timeline.show(index - this.timeline.frames.dropped);
      this.lastShown = performance.now();
    }
  }

  /** Waits until everything was shown for its time; the last frame of all stays for its own. */
  async shown() {
    if (this.queue.length) {
      await new Promise((done) => {
        this.emptied = done;
        this.hurry = () => this.flush();
        this.schedule();
      });
    }
    this.emptied = this.hurry = null;
  }
}

// Sudoku ------------------------------------------------------------------------------------------------------------

/** A board of digits as strings, "" for a blank: rules, and its solutions. */
class Board {
  constructor(size) {
    this.size = size;
    this.cells = new Array(size * size).fill("");
    const [high, wide] = size === 6 ? [2, 3] : [3, 3];
    Object.assign(this, { high, wide });
    const line = [...Array(size).keys()];
    this.units = [
      ...line.map((row) => ({ name: `row ${row + 1}`, cells: line.map((column) => row * size + column) })),
      ...line.map((column) => ({ name: `column ${column + 1}`, cells: line.map((row) => row * size + column) })),
      ...line.map((box) => {
        const top = Math.floor(box / (size / wide)) * high;
        const left = (box % (size / wide)) * wide;
        return { name: `box ${box + 1}`, cells: line.map((k) => (top + Math.floor(k / wide)) * size + left + (k % wide)) };
      }),
    ];
    this.unitsOf = this.cells.map((_, cell) => this.units.flatMap((unit, at) => (unit.cells.includes(cell) ? [at] : [])));
  }

  /** Cells with a digit that stands twice in a unit, and the first such case in words. */
  conflicts(cells = this.cells) {
    const found = new Set();
    let words = "";
    for (const unit of this.units) {
      const seen = new Map();
      for (const cell of unit.cells) {
        const digit = cells[cell];
        if (!/^[1-9]$/.test(digit)) continue;
        if (seen.has(digit)) {
          found.add(cell).add(seen.get(digit));
          words ||= `${unit.name} has two ${digit}s`;
        } else seen.set(digit, cell);
      }
    }
    return { cells: found, words };
  }

  /** How many solutions the board has, 2 for more than one; null where the search takes too long. */
  solutions() {
    const all = (1 << this.size) - 1;
    const free = this.units.map(() => all);
    const blanks = [];
    for (const [cell, digit] of this.cells.entries()) {
      if (!digit) {
        blanks.push(cell);
        continue;
      }
      for (const unit of this.unitsOf[cell]) {
        if (!(free[unit] & (1 << (digit - 1)))) return 0;
        free[unit] &= ~(1 << (digit - 1));
      }
    }
    let found = 0;
    let left = 50_000;
    const search = () => {
      if (!blanks.length) return void found++;
      if (--left < 0) return;
      let best = -1;
      let bits = 0;
      let fewest = Infinity;
      for (const [place, cell] of blanks.entries()) {
        const may = this.unitsOf[cell].reduce((mask, unit) => mask & free[unit], all);
        let count = 0;
        for (let rest = may; rest; rest &= rest - 1) count++;
        if (count < fewest) [best, bits, fewest] = [place, may, count];
        if (count <= 1) break;
      }
      const [cell] = blanks.splice(best, 1);
      for (let rest = bits; rest && found < 2 && left >= 0; rest &= rest - 1) {
        const bit = rest & -rest;
        for (const unit of this.unitsOf[cell]) free[unit] ^= bit;
        search();
        for (const unit of this.unitsOf[cell]) free[unit] ^= bit;
      }
      blanks.splice(best, 0, cell);
    };
    search();
    return left < 0 && found < 2 ? null : found;
  }
}

const sudoku = {
  board: null,
  shown: [], // the digits of the answer; [] while the board is edited
  buttons: [],
  focus: 0,
  edits: 0,

  open(size) {
    this.board = new Board(size);
    at("tab-sudoku").hidden = false;
    const grid = at("board");
    grid.classList.add(`size-${size}`);
    for (let row = 0; row < size; row++) {
      const line = make("div", { role: "row", className: "board-row" });
      for (let column = 0; column < size; column++) {
        const cell = make("div", { role: "gridcell", tabIndex: -1, className: "cell" });
        cell.classList.toggle("box-left", column > 0 && column % this.board.wide === 0);
        cell.classList.toggle("box-top", row > 0 && row % this.board.high === 0);
        cell.addEventListener("mousedown", () => this.moveTo(row * size + column));
        this.buttons.push(cell);
        line.append(cell);
      }
      grid.append(line);
    }
    this.names = this.buttons.map((cell) => cell.className);
    this.buttons[0].tabIndex = 0;
    for (const digit of [...Array(size).keys()].map((k) => String(k + 1)).concat("")) {
      const name = digit ? {} : { "aria-label": "Empty the cell" };
      const button = make("button", { type: "button", className: "digit", textContent: digit || "⌫", ...name });
      button.addEventListener("click", () => this.put(digit));
      at("pad").append(button);
    }
    grid.addEventListener("keydown", (event) => this.keyed(event));
    grid.addEventListener("paste", (event) => this.pasted(event));
    this.timeline = new Timeline((frame, isLast) => this.drawFrame(frame, isLast));
    at("sudoku-timeline").append(this.timeline.element);
    at("solve").addEventListener("click", () => (running ? running.stop() : this.solve()));
    at("new-puzzle").addEventListener("click", () => this.draw());
    at("clear-board").addEventListener("click", () => this.fill(new Array(size * size).fill("")));
    this.redraw();
  },

  /** Draws a new puzzle on the server. */
  async draw() {
    running?.stop();
    try {
      const { puzzle } = await (await ask("page/sudoku")).json();
      this.fill([...puzzle].map((digit) => (digit === "." ? "" : digit)));
    } catch (error) {
      tell(error, () => this.draw());
    }
  },

  fill(cells) {
    running?.stop();
    this.board.cells = cells;
    this.edited();
  },

  edited() {
    this.edits++;
    this.shown = [];
    this.timeline.begin();
    this.timeline.end();
    this.redraw();
    const { words } = this.board.conflicts();
    const count = words ? 0 : this.board.solutions();
    const blanks = this.board.cells.filter((digit) => !digit).length;
    if (words) this.judge("bad", `Impossible: ${words}. The model can only guess.`);
    else if (count === 0) this.judge("bad", "Impossible: no digits fit into all blanks. The model can only guess.");
    else if (!blanks) this.judge("good", "The board is full, and right.");
    else if (count === 1) this.judge("", `${plural(blanks, "blank")}, one solution.`);
    else this.judge("", `${plural(blanks, "blank")}, more than one solution.`);
  },

  judge(kind, words) {
    at("verdict").className = `verdict ${kind}`;
    at("verdict").textContent = words;
  },

  moveTo(cell) {
    this.buttons[this.focus].tabIndex = -1;
    this.buttons[this.focus].removeAttribute("aria-selected");
    this.focus = cell;
    this.buttons[cell].tabIndex = 0;
    this.buttons[cell].setAttribute("aria-selected", "true");
    this.buttons[cell].focus();
  },

  keyed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { size } = this.board;
    const row = Math.floor(this.focus / size);
    const column = this.focus % size;
    const moves = {
      ArrowLeft: [row, Math.max(0, column - 1)],
      ArrowRight: [row, Math.min(size - 1, column + 1)],
      ArrowUp: [Math.max(0, row - 1), column],
      ArrowDown: [Math.min(size - 1, row + 1), column],
      Home: [row, 0],
      End: [row, size - 1],
    };
    if (moves[event.key]) {
      const [nextRow, nextColumn] = moves[event.key];
      this.moveTo(nextRow * size + nextColumn);
    } else if (/^[0-9]$/.test(event.key) && Number(event.key) <= size) this.put(event.key === "0" ? "" : event.key);
    else if (["Backspace", "Delete", " ", "."].includes(event.key)) this.put("");
    else if (event.key === "Enter") this.solve();
    else if (event.key === "Escape") running?.stop();
    else return;
    event.preventDefault();
  },

  put(digit) {
    running?.stop();
    this.board.cells[this.focus] = digit;
    this.edited();
  },

  pasted(event) {
    const text = event.clipboardData.getData("text").replace(/\s/g, "");
    const { size } = this.board;
    if (text.length !== size * size || ![...text].every((one) => ".0".includes(one) || (one >= "1" && one <= String(size)))) {
      this.judge("bad", `A puzzle is a line of ${size * size} characters: digits up to ${size}, and dots for blanks.`);
      return;
    }
    event.preventDefault();
    this.fill([...text].map((one) => (".0".includes(one) ? "" : one)));
  },

  /** The board's text, and the canvas that holds its digits in place. */
  request() {
    const { cells } = this.board;
    const messages = [{ role: "user", content: cells.map((digit) => digit || ".").join("") }];
    if (!at("pin-givens").checked || !cells.some(Boolean)) return settings.body(messages);
    const parts = [];
    for (const digit of cells) {
      const last = parts.at(-1);
      if (digit && last?.pinned) last.text += digit;
      else if (digit) parts.push({ text: digit, pinned: true });
      else if (last?.blank) last.blank++;
      else parts.push({ blank: 1 });
    }
    return settings.body(messages, { start_text: parts });
  },

  async solve() {
    if (running) return;
    at("solve").textContent = "Stop";
    this.judge("", "Denoising …");
    hideNotice();
    try {
      const { edits } = this;
      const answer = new Answer(this.request(), this.timeline);
      await answer.run();
      if (edits === this.edits) this.finish(answer);
      else this.edited(); // the board was changed meanwhile
    } catch (error) {
      this.judge("", "");
      tell(error, () => this.solve());
    } finally {
      at("solve").textContent = "Solve";
    }
  },

  finish(answer) {
    const count = this.board.cells.length;
    if (answer.isStopped) {
      this.judge("", "Stopped. What stands there is a draft.");
      return;
    }
    const digits = [...answer.text.trim()];
    const took = `${plural(answer.usage?.diffusion?.denoising_steps ?? this.timeline.frames.list.length, "step")}, ${fixed(answer.seconds, 2)} s`;
    if (digits.length !== count || !digits.every((one) => /^[1-9]$/.test(one) && Number(one) <= this.board.size)) {
      this.judge("bad", "Wrong: the answer is not a full board.");
      return;
    }
    this.shown = digits;
    const { cells, words } = this.board.conflicts(digits);
    const changed = this.board.cells.findIndex((digit, cell) => digit && digit !== digits[cell]);
    this.redraw(cells);
    if (words) this.judge("bad", `Wrong: ${words}. ${took}.`);
    else if (changed >= 0) this.judge("bad", `Wrong: the given digit in row ${Math.floor(changed / this.board.size) + 1} was changed. ${took}.`);
    else this.judge("good", `Solved: every row, column and box is right. ${took}.`);
  },

  drawFrame(frame, isLast) {
    if (isLast && this.shown.length) return this.redraw(this.board.conflicts(this.shown).cells);
    this.board.cells.forEach((given, cell) => {
      const piece = frame.pieces[cell] ?? "";
      const isDigit = piece.length === 1 && piece !== "." && piece.trim() === piece;
      // A cell has the colours of a token, but for what is only true of running text.
      const name = given && frame.flags[cell] & PINNED ? "given" : classOf(frame, cell).replace(/ (?:after|end|thought)/g, "").slice(6);
      this.paint(cell, isDigit ? piece : "·", name + (isDigit ? "" : " noise"));
    });
  },

  redraw(wrong = this.board.conflicts().cells) {
    this.board.cells.forEach((given, cell) => {
      const digit = this.shown[cell] ?? given;
      const name = given ? "given" : digit ? "found" : "";
      this.paint(cell, digit, name + (wrong.has(cell) ? " wrong" : ""));
    });
  },

  paint(cell, digit, name) {
    const element = this.buttons[cell];
    const full = `${this.names[cell]} ${name}`;
    if (element.textContent !== digit) element.textContent = digit;
    if (element.className === full) return;
    element.className = full;
    const { size } = this.board;
    const kind = name.startsWith("given") ? `${digit}, given` : digit && digit !== "·" ? digit : "blank";
    element.setAttribute("aria-label", `Row ${Math.floor(cell / size) + 1}, column ${(cell % size) + 1}: ${kind}${name.includes("wrong") ? ", in conflict" : ""}`);
  },
};

// Chat --------------------------------------------------------------------------------------------------------------

const EXAMPLES = ["Why is the sky blue?", "Write a haiku about noise that becomes words.", "What is a Markov chain? Two sentences."];

const chat = {
  messages: [],
  canvas: null,

  open(isSudoku) {
    this.timeline = new Timeline((frame, isLast) => this.drawFrame(frame, isLast));
    at("chat-timeline").append(this.timeline.element);
    const form = at("composer");
    const field = at("message");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (running) running.stop();
      else if (field.value.trim() || pictures.chosen.length) this.send(field.value.trim());
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!running) form.requestSubmit();
      }
    });
    field.addEventListener("input", () => this.fit());
    at("view-chat").addEventListener("keydown", (event) => event.key === "Escape" && running?.stop());
    at("new-chat").addEventListener("click", () => this.restart());
    if (isSudoku) {
      at("examples").append(make("p", { textContent: "This model has only ever seen Sudoku. It answers a puzzle in one line:" }));
      ask("page/sudoku").then((response) => response.json()).then(({ puzzle }) => this.example(puzzle), () => {});
    } else EXAMPLES.forEach((text) => this.example(text));
    this.welcome = at("welcome");
  },

  example(text) {
    const button = make("button", { type: "button", className: "example", textContent: text });
    button.addEventListener("click", () => !running && this.send(text));
    at("examples").append(button);
  },

  fit() {
    const field = at("message");
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight + 2, 200)}px`;
  },

  restart() {
    running?.stop();
    this.messages = [];
    this.canvas = null;
    this.current = null;
    pictures.put([]);
    at("log").replaceChildren(this.welcome);
    this.timeline.begin();
    this.timeline.end();
    at("message").focus();
  },

  bubble(role, name) {
    const body = make("div", { className: "words" });
    const article = make("article", { className: `message ${role}` }, make("h3", { className: "who", textContent: name }), body);
    if (this.welcome.isConnected) this.welcome.remove();
    at("log").append(article);
    return { article, body };
  },

  async send(text) {
    const images = pictures.take();
    this.messages.push({ role: "user", content: pictures.content(images, text) });
    const { article, body } = this.bubble("user", "You");
    body.textContent = text;
    if (images.length) body.prepend(pictures.shown(images));
    at("message").value = "";
    this.fit();
    if (!(await this.answer())) {
      // What was not answered goes back to where it was written.
      this.messages.pop();
      article.remove();
      if (!at("message").value) at("message").value = text;
      if (!pictures.chosen.length) pictures.put(images);
      this.fit();
    }
  },

  /** Asks for the next message of the chat; returns whether there is one. */
  async answer() {
    hideNotice();
    const { article, body } = this.bubble("model", settings.model?.id ?? "Model");
    const words = make("p", { className: "text" });
    const live = make("div", { className: "live", "aria-hidden": "true" }, words);
    body.append(live);
    article.setAttribute("aria-busy", "true");
    this.canvas = new Canvas(words);
    this.current = { article, body, live, text: "", isFinished: false };
    at("send").textContent = "Stop";
    at("log").setAttribute("aria-busy", "true");
    this.follow();
    say("The model is writing.");
    const { messages } = this;
    let said = 0;
    try {
      const body = { ...settings.body([...settings.systemMessages(), ...this.messages]), ...settings.ofChat() };
      const onCommit = (commit) => {
        this.current.text = commit.text;
        this.canvas.settle(commit.text);
        say(commit.text.slice(said));
        said = commit.text.length;
        this.follow();
      };
      const answer = new Answer(body, this.timeline, { onCommit });
      await answer.run();
      if (messages === this.messages) this.finish(answer); // a new chat may have begun
      return true;
    } catch (error) {
      article.remove();
      this.current = null;
      tell(error, error.status === 401 ? null : () => at("composer").requestSubmit());
      return false;
    } finally {
      article.removeAttribute("aria-busy");
      at("log").removeAttribute("aria-busy");
      at("send").textContent = "Send";
    }
  },

  finish(answer) {
    const { body, live } = this.current;
    const text = answer.isStopped && this.timeline.frames.list.length ? this.stoppedText(answer) : answer.text;
    this.current.text = text;
    this.current.isFinished = true;
    this.canvas.settle(text);
    live.removeAttribute("aria-hidden");
    if (answer.thinking) {
      const folded = make("details", { className: "thinking" }, make("summary", { textContent: "Thoughts" }), make("p", { className: "text", textContent: answer.thinking }));
      body.prepend(folded);
    }
    const message = { role: "assistant", content: text };
    if (answer.calls.length) {
      message.tool_calls = answer.calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
    }
    this.messages.push(message);
    if (answer.calls.length) this.showCalls(answer.calls, body);
    const remark = answer.isStopped ? "Stopped; this is a draft." : answer.reason === "length" ? "Cut at the longest length." : "";
    if (remark) live.after(make("p", { className: "remark", textContent: remark }));
    live.hidden = !text;
    if (answer.body.response_format && isJson(text)) {
      const heading = make("h4", { textContent: "Parsed" });
      body.append(make("section", { className: "parsed", "aria-label": "The answer, parsed" }, heading, valueView(JSON.parse(text))));
    }
    if (answer.isStopped) say(`Stopped. The draft: ${text}`);
    else if (answer.calls.length) say(`The model calls ${answer.calls.map(({ name }) => name).join(", ")}.`);
    this.follow();
  },

  stoppedText(answer) {
    const last = this.timeline.frames.list.at(-1);
    return last.before === answer.text ? answer.text + last.text : answer.text;
  },

  /** Tool calls as cards, each with a field for what the tool gave; when all are filled in, the chat goes on. */
  showCalls(calls, body) {
    const results = calls.map((call, index) => {
      const field = make("textarea", { id: `result-${this.messages.length}-${index}`, rows: 2, spellcheck: false });
      const given = make("pre", { className: "arguments", textContent: pretty(call.arguments) });
      body.append(
        make("section", { className: "call", "aria-label": `Call of the tool ${call.name}` },
          make("h4", { textContent: call.name }), given,
          make("label", { htmlFor: field.id, textContent: "What the tool gives" }), field),
      );
      return field;
    });
    const button = make("button", { type: "button", textContent: plural(calls.length, "result") === "1 result" ? "Send the result" : "Send the results" });
    button.addEventListener("click", async () => {
      if (running) return;
      const sent = results.map((field, index) => ({ role: "tool", tool_call_id: calls[index].id, name: calls[index].name, content: field.value }));
      this.messages.push(...sent);
      if (await this.answer()) [button, ...results].forEach((one) => (one.disabled = true));
      else this.messages.splice(-sent.length);
    });
    body.append(button);
  },

  drawFrame(frame, isLast) {
    if (!this.current) return;
    if (isLast && this.current.isFinished) {
      this.current.live.hidden = !this.current.text;
      return this.canvas.settle(this.current.text);
    }
    this.current.live.hidden = false;
    this.canvas.draw(frame);
    if (!this.current.isFinished) this.follow();
  },

  /** Keeps the end in sight where it was. */
  follow() {
    const log = at("log");
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
  },
};

function pretty(json) {
  return isJson(json) ? JSON.stringify(JSON.parse(json), null, 2) : json;
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** A JSON value as lists that can be read: an object's fields by name, an array's items by number. */
function valueView(value) {
  const plain = (kind, text) => make("span", { className: `value ${kind}`, textContent: text });
  if (value === null || typeof value !== "object") {
    return plain(value === null ? "null" : typeof value, typeof value === "string" ? value : JSON.stringify(value));
  }
  const entries = Object.entries(value);
  if (!entries.length) return plain("empty", Array.isArray(value) ? "empty list" : "no fields");
  if (Array.isArray(value)) return make("ol", { className: "items" }, ...value.map((one) => make("li", {}, valueView(one))));
  return make("dl", { className: "fields" }, ...entries.flatMap(([name, one]) => [make("dt", { textContent: name }), make("dd", {}, valueView(one))]));
}

// Edit --------------------------------------------------------------------------------------------------------------

const SAMPLE =
  "The old lighthouse stands at the end of the pier. It was built in 1871, and nobody remembers why it was painted red. In winter the keeper reads aloud to the gulls.";
// Characters of a token in running text, about.
const TOKEN = 3.5;

const editor = {
  isSudoku: false,
  past: [],

  open(isSudoku) {
    this.isSudoku = isSudoku;
    this.timeline = new Timeline((frame, isLast) => this.drawFrame(frame, isLast));
    at("edit-timeline").append(this.timeline.element);
    const field = at("document");
    field.value = SAMPLE;
    if (isSudoku) {
      field.value = "";
      ask("page/sudoku").then((response) => response.json()).then(({ solution }) => {
        if (!field.value) field.value = solution;
        field.setSelectionRange(12, 24);
        this.noticeSelection();
      }, () => {});
    } else field.setSelectionRange(SAMPLE.indexOf("nobody"), SAMPLE.indexOf(". In winter"));
    for (const event of ["select", "keyup", "mouseup", "input", "focus"]) field.addEventListener(event, () => this.noticeSelection());
    document.addEventListener("selectionchange", () => document.activeElement === field && this.noticeSelection());
    field.addEventListener("scroll", () => (at("backdrop").scrollTop = field.scrollTop));
    at("rewrite").addEventListener("click", () => (running ? running.stop() : this.rewrite()));
    at("undo").addEventListener("click", () => this.undo());
    at("view-edit").addEventListener("keydown", (event) => event.key === "Escape" && running?.stop());
    this.canvas = new Canvas(make("span"));
    this.noticeSelection();
  },

  selected() {
    const { value, selectionStart: begin, selectionEnd: end } = at("document");
    return { before: value.slice(0, begin), middle: value.slice(begin, end), after: value.slice(end), begin };
  },

  /** Marks the selection behind the text, where it stays to be seen while another field has the focus. */
  noticeSelection() {
    if (this.isBusy) return;
    const { before, middle, after } = this.selected();
    at("document").parentElement.classList.remove("is-running");
    const mark = make("mark", { textContent: middle });
    at("backdrop").replaceChildren(before, mark, `${after}\n`);
    at("room").placeholder = String(this.usualRoom(middle));
    at("selection").textContent = middle
      ? `${plural([...middle].length, "character")} selected; ${plural([...(before + after)].length, "character")} pinned.`
      : "Nothing is selected: new text goes where the cursor stands.";
  },

  usualRoom(middle) {
    if (this.isSudoku) return Math.max(1, [...middle].length);
    return middle ? Math.max(1, Math.ceil(middle.length / TOKEN)) : 16;
  },

  /**
   * What is asked: the text in a message, and a canvas with the text around the selection pinned.
   *
   * Of a long text the canvas holds what is nearest to the selection, so that one canvas is enough.
   */
  request({ before, middle, after }) {
    const room = Number(at("room").value.trim() || this.usualRoom(middle));
    if (!Number.isInteger(room) || room < 1) throw new ServerError(400, "Room must be a whole number of tokens from 1 on", "room");
    const isClose = at("close-edit").checked && middle !== "";
    const letters = this.isSudoku ? Infinity : Math.max(40, Math.floor(((settings.canvasLength() - room) * TOKEN) / 2.5));
    const near = { before: endOf(before, letters), after: beginOf(after, letters) };
    const parts = [];
    if (near.before) parts.push({ text: near.before, pinned: true });
    parts.push(isClose ? { text: middle } : { blank: room });
    if (near.after) parts.push({ text: near.after, pinned: true });
    const instruction = at("instruction").value.trim();
    const content = this.isSudoku
      ? before + ".".repeat(room) + after
      : `${instruction || "Fill in the gap of this text so that it reads well."}\n\n${before}[…]${after}${middle ? `\n\nIn the gap stood: ${middle}` : ""}`;
    const diffusion = { start_text: parts };
    if (isClose) {
      const steps = settings.valueOf(FIELDS[0]) ?? settings.model?.diffusion?.max_denoising_steps ?? 48;
      diffusion.start_step = Math.max(1, Math.ceil(steps / 2));
    }
    return { body: settings.body([{ role: "user", content }], diffusion), near };
  },

  async rewrite() {
    const field = at("document");
    const parts = this.selected();
    hideNotice();
    try {
      const { body, near } = this.request(parts);
      this.parts = parts;
      this.near = near;
      this.isBusy = true;
      field.readOnly = true;
      field.parentElement.classList.add("is-running");
      at("rewrite").textContent = "Stop";
      at("backdrop").replaceChildren(
        make("span", { className: "far", textContent: parts.before.slice(0, parts.before.length - near.before.length) }),
        this.canvas.home,
        make("span", { className: "far", textContent: parts.after.slice(near.after.length) }),
      );
      // What the model writes behind the pinned end is not wanted.
      const isEnough = (text) => near.after !== "" && text.indexOf(near.after, near.before.length) >= 0;
      const answer = new Answer(body, this.timeline, { isEnough });
      await answer.run();
      this.take(this.middleOf(answer));
    } catch (error) {
      tell(error, () => this.rewrite());
    } finally {
      field.readOnly = false;
      field.parentElement.classList.remove("is-running");
      at("rewrite").textContent = "Rewrite the selection";
      this.isBusy = false;
      this.noticeSelection();
    }
  },

  /** What now stands between the pinned parts: by the text, or by the tokens where the text ends before it. */
  middleOf(answer) {
    const { before, after } = this.near;
    const text = answer.text || answer.draft;
    const end = after ? text.indexOf(after, before.length) : text.length;
    if (text.startsWith(before) && end >= 0) return text.slice(before.length, end);
    const frame = this.timeline.frames.list.findLast((one) => one.canvas === 0);
    if (!frame) return null;
    let place = 0;
    while (place < frame.pieces.length && frame.flags[place] & PINNED) place++;
    const begin = before ? place : 0;
    let last = begin;
    while (last < frame.pieces.length && !(frame.flags[last] & (PINNED | END | AFTER))) last++;
    return frame.pieces.slice(begin, last).join("");
  },

  take(middle) {
    const field = at("document");
    if (middle === null) return;
    this.past.push({ value: field.value, begin: this.parts.begin, end: this.parts.begin + this.parts.middle.length });
    if (this.past.length > 50) this.past.shift();
    field.value = this.parts.before + middle + this.parts.after;
    field.setSelectionRange(this.parts.begin, this.parts.begin + middle.length);
    at("undo").disabled = false;
    say(`Rewritten: ${middle}`);
  },

  undo() {
    const { value, begin, end } = this.past.pop();
    const field = at("document");
    field.value = value;
    field.focus();
    field.setSelectionRange(begin, end);
    at("undo").disabled = !this.past.length;
    this.noticeSelection();
  },

  drawFrame(frame, isLast) {
    const isReplay = !this.isBusy;
    at("document").parentElement.classList.toggle("is-running", !(isReplay && isLast));
    if (isReplay && isLast) return this.noticeSelection();
    if (isReplay) at("backdrop").replaceChildren(this.canvas.home);
    this.canvas.draw(frame);
  },
};

/** The end of a text, from a word's beginning on, of about so many characters; and its beginning. */
function endOf(text, letters) {
  if (text.length <= letters) return text;
  const cut = text.slice(text.length - letters);
  const space = cut.search(/\s/);
  return space < 0 ? cut : cut.slice(space);
}

function beginOf(text, letters) {
  if (text.length <= letters) return text;
  const cut = text.slice(0, letters);
  const space = cut.search(/\s\S*$/);
  return space <= 0 ? cut : cut.slice(0, space);
}

// The frame of the page ---------------------------------------------------------------------------------------------

const THEME = "dgemma.theme";

function showTheme() {
  const chosen = localStorage.getItem(THEME);
  const isDark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (chosen) document.documentElement.dataset.theme = chosen;
  at("theme-switch").setAttribute("aria-pressed", String(isDark));
  return isDark;
}

function openTab(name, focuses = false) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isChosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !isChosen;
    if (isChosen && focuses) tab.focus();
  }
  if (focuses) history.replaceState(null, "", `#${name}`);
}

function setUpFrame() {
  showTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  at("theme-switch").addEventListener("click", () => {
    localStorage.setItem(THEME, showTheme() ? "light" : "dark");
    showTheme();
  });
  const list = document.querySelector("[role=tablist]");
  list.addEventListener("click", (event) => event.target.id.startsWith("tab-") && chosen(event.target));
  list.addEventListener("keydown", (event) => {
    const tabs = [...list.querySelectorAll("[role=tab]:not([hidden])")];
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    if (!steps[event.key]) return;
    const next = tabs[(tabs.indexOf(event.target) + steps[event.key] + tabs.length) % tabs.length];
    chosen(next);
    event.preventDefault();
  });
  const chosen = (tab) => {
    if (tab.getAttribute("aria-selected") !== "true") running?.stop();
    openTab(tab.id.slice(4), true);
  };
  const toggle = (isOpen) => {
    at("settings").hidden = !isOpen;
    at("settings-switch").setAttribute("aria-expanded", String(isOpen));
    document.body.classList.toggle("has-settings", isOpen);
    (isOpen ? at("settings").querySelector("input") : at("settings-switch")).focus();
  };
  at("settings-switch").addEventListener("click", () => toggle(at("settings").hidden));
  at("settings-close").addEventListener("click", () => toggle(false));
  at("settings").addEventListener("keydown", (event) => event.key === "Escape" && toggle(false));
  at("notice-close").addEventListener("click", hideNotice);
  at("notice-retry").addEventListener("click", () => {
    hideNotice();
    notice.retry?.();
  });
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = at("key").value.trim();
    sessionStorage.setItem(KEY, key);
    at("key").value = "";
    hideNotice();
    if (settings.model) notice.retry?.();
    else start();
  });
}

let facts = null;
let isOpen = false;

/** Asks the server what it is, and opens the views. */
async function start() {
  try {
    facts ??= await (await ask("page/facts")).json();
    if (facts.needs_key && !key) return tell(new ServerError(401, ""));
    const { data } = await (await ask("v1/models")).json();
    settings.describe(data[0]);
  } catch (error) {
    return tell(error, start);
  }
  if (isOpen) return;
  isOpen = true;
  chat.open(facts.sudoku !== null);
  if (settings.model.architecture?.input_modalities.includes("image")) pictures.open();
  editor.open(facts.sudoku !== null);
  if (facts.sudoku !== null) {
    settings.speed.value = "700"; // its answers take few steps, which are soon over
    sudoku.open(facts.sudoku);
    sudoku.draw();
  }
  document.querySelector("[role=tablist]").hidden = false;
  const wanted = location.hash.slice(1);
  const known = ["chat", "edit", ...(facts.sudoku === null ? [] : ["sudoku"])];
  openTab(known.includes(wanted) ? wanted : facts.sudoku === null ? "chat" : "sudoku");
}

settings.build();
setUpFrame();
start();
