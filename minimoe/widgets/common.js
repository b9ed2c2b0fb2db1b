// What explorables share: elements, controls, drawing, words. Put before an explorable's widget.js in one module;
// STYLE, the text of common.css, is put before both.

// --- elements --------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "tspan", "polyline", "polygon", "title", "defs", "pattern"]);
let ids = 0;

// h("button", {class: "x", onclick: f}, "text", child): an element with attributes, listeners and children.
function h(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// --- controls: native, labelled, with their value beside them ---------------------------------------------------

// A slider. `show` turns its number into what the reader sees; `values` makes it choose from a list instead.
// Returns {element, input, value, set}: `value` is the number (or the list's entry) chosen.
function slider({ label, min = 0, max = 1, step = 1, value, values, show = String, oninput }) {
  const id = `mm-${(ids += 1)}`;
  if (values) [min, max, step, value] = [0, values.length - 1, 1, Math.max(0, values.indexOf(value))];
  const input = h("input", { type: "range", id, min, max, step });
  input.value = value;
  const output = h("output", { for: id });
  const control = {
    element: h("div", { class: "mm-control" }, h("label", { for: id }, label), input, output),
    input,
    get value() {
      return values ? values[Number(input.value)] : Number(input.value);
    },
    set(next) {
      input.value = values ? values.indexOf(next) : next;
      tell();
    },
  };
  const tell = () => {
    output.textContent = show(control.value);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    tell();
    oninput?.(control.value);
  });
  tell();
  return control;
}

// A choice among named options, [[value, text], ...] or [text, ...]. Returns {element, value, set}.
function select({ label, options, value, oninput }) {
  const id = `mm-${(ids += 1)}`;
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const input = h("select", { id }, pairs.map(([key, text]) => h("option", { value: key }, text)));
  if (value !== undefined) input.value = value;
  input.addEventListener("input", () => oninput?.(input.value));
  return {
    element: h("div", { class: "mm-control" }, h("label", { for: id }, label), input),
    input,
    get value() {
      return input.value;
    },
    set(next) {
      input.value = next;
    },
  };
}

// A box to tick. Returns {element, value, set}.
function checkbox({ label, value = false, oninput }) {
  const id = `mm-${(ids += 1)}`;
  const input = h("input", { type: "checkbox", id });
  input.checked = value;
  input.addEventListener("input", () => oninput?.(input.checked));
  return {
    element: h("div", { class: "mm-control mm-check" }, input, h("label", { for: id }, label)),
    input,
    get value() {
      return input.checked;
    },
    set(next) {
      input.checked = next;
    },
  };
}

function button(text, onclick) {
  return h("button", { type: "button", class: "mm-button", onclick }, text);
}

// A button that turns a slider of whole numbers to its end, from where it is or, at the end, from its start.
// Readers who ask for less motion get ten steps, one a second. Returns {element, playing, stop}.
function player(control, { milliseconds = 150, text = "Play" } = {}) {
  const { input } = control;
  let timer;
  const element = button(text, () => (timer ? stop() : start()));
  function stop() {
    clearInterval(timer);
    timer = undefined;
    element.textContent = text;
  }
  function go(value) {
    control.set(value);
    input.dispatchEvent(new Event("input"));
  }
  function start() {
    const [low, high] = [Number(input.min), Number(input.max)];
    const calm = lessMotion();
    if (Number(input.value) >= high) go(low);
    timer = setInterval(() => {
      const next = Number(input.value) + (calm ? Math.ceil((high - low) / 10) : 1);
      if (element.isConnected) go(Math.min(next, Number(input.max)));
      if (!element.isConnected || next >= Number(input.max)) stop();
    }, calm ? 1000 : milliseconds);
    element.textContent = "Pause";
  }
  // whoever takes the slider has it
  input.addEventListener("pointerdown", stop);
  input.addEventListener("keydown", stop);
  return {
    element,
    stop,
    get playing() {
      return timer !== undefined;
    },
  };
}

// Whether the reader has asked the system for less motion.
const lessMotion = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

// --- words ------------------------------------------------------------------------------------------------------

// The sentence that says what is to be seen. Screen readers hear it when the reader pauses.
function status() {
  const element = h("p", { class: "mm-status", role: "status" });
  let waiting;
  return {
    element,
    say(text) {
      clearTimeout(waiting);
      if (!element.textContent) element.textContent = text;
      else waiting = setTimeout(() => (element.textContent = text), 250);
    },
  };
}

// A table behind a fold. Returns {element, set(rows)}; the first cell of each row is its head.
function table(summary, heads) {
  const body = h("tbody");
  const element = h(
    "details",
    { class: "mm-table" },
    h("summary", {}, summary),
    h(
      "div",
      { class: "mm-scroll", tabindex: 0, role: "region", "aria-label": summary },
      h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), body),
    ),
  );
  return {
    element,
    set(rows) {
      body.replaceChildren(
        ...rows.map(([head, ...cells]) =>
          h("tr", {}, h("th", { scope: "row" }, head), cells.map((cell) => h("td", {}, cell)))),
      );
    },
  };
}

// A drawing of width × height units that fits its place. Returns {element, describe, draw(children)}.
function drawing(width, height, description = "") {
  const element = h("svg", { viewBox: `0 0 ${width} ${height}`, class: "mm-drawing", role: "img" });
  element.setAttribute("aria-label", description);
  return {
    element,
    describe(text) {
      element.setAttribute("aria-label", text);
    },
    draw(...children) {
      element.replaceChildren(...children.flat().filter(Boolean));
    },
  };
}

// Hand over what was chosen only when the reader has paused.
function after(milliseconds, f) {
  let waiting;
  return (...given) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => f(...given), milliseconds);
  };
}

// --- numbers ----------------------------------------------------------------------------------------------------

// 0.276 -> "28 %". Only nothing is 0 % and only everything 100 %: what lies between and would be rounded there is said
// to be less or more.
export function percent(share, digits = 0) {
  const step = 10 ** -digits;
  const shown = (100 * share).toFixed(digits);
  if (share > 0 && Number(shown) === 0) return `< ${step.toFixed(digits)} %`;
  if (share < 1 && Number(shown) === 100) return `> ${(100 - step).toFixed(digits)} %`;
  return `${shown} %`;
}

// A difference of shares, with its sign: "+3 %", "−3 %".
export const difference = (share, digits = 0) => `${share > 0 ? "+" : ""}${(100 * share).toFixed(digits)} %`.replace("-", "−");

// A probability in little room: ".28", and "1" only for what is no nearer to .99.
export const short = (p) => (p.toFixed(2) === "1.00" ? "1" : p.toFixed(2).slice(1));

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// 46,702,792,704 -> "46.7 G"; with a unit: "46.7 GB".
function si(number, unit = "", digits = 3) {
  const steps = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]];
  const size = Math.abs(number);
  const [step, prefix] = size === 0 ? [1, ""] : (steps.find(([s]) => Number((size / s).toPrecision(digits)) >= 1) ?? steps.at(-1));
  const shown = Number((number / step).toPrecision(digits));
  return `${shown} ${prefix}${unit}`.trim();
}

// Numbers from 0 to 1 that repeat with the seed (mulberry32, a public-domain generator by Tommy Ettinger).
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
  };
}

// Standard normal numbers that repeat with the seed (Box and Muller).
function normals(seed) {
  const uniform = uniforms(seed);
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

// --- the frame --------------------------------------------------------------------------------------------------

// A binary file that comes with the explorable, as an ArrayBuffer: a page gives a function that loads it, JupyterLab has it
// from the kernel.
async function file(model, name) {
  const files = model.get("files");
  const view = typeof files === "function" ? await files(name) : files?.[name];
  if (!view) throw new Error(`its file ${name} could not be loaded`);
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

// What a widget.js exports: export default explorable(async ({model, data, stage, width, reset}) => {...fill stage...}), where
// width is the room for a drawing in pixels, so that text keeps its size on a narrow screen, and reset a button that makes
// the whole explorable anew, to be put somewhere.
// What goes wrong is said in a sentence, and the static figure stays.
function explorable(start) {
  return {
    async render({ model, el }) {
      if (!document.getElementById("mm-style")) document.head.append(h("style", { id: "mm-style" }, STYLE));
      const width = Math.max(270, Math.min(700, (el.clientWidth || 700) - (el.clientWidth < 480 ? 22 : 34)));
      let stop;
      const begin = async () => {
        const stage = h("div", { class: "mm-explorable" });
        const reset = button("As at first", async () => {
          stop?.();
          (await begin()).focus();
        });
        stop = await start({ model, data: model.get("data"), stage, width, reset });
        el.replaceChildren(stage);
        return reset;
      };
      try {
        await begin();
        return () => stop?.();
      } catch (error) {
        el.dataset.failed = error.message;
        const figure = document.createElement("div");
        figure.innerHTML = model.get("figure") ?? "";
        el.append(h("p", { class: "mm-failed", role: "status" }, `This explorable could not start: ${error.message}. The figure stands in for it.`), figure);
      }
    },
  };
}
