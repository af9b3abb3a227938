import { readPng, writePng } from "./png.js";

const MOST_STEPS = 100; // of undo
const LARGEST_FILE = 2 ** 26; // bytes
const MANY = 16; // classes, from which on the page offers a search
const RETRY = 1000; // milliseconds before a failed request is sent again
const KEYS = { b: "brush", l: "line", f: "fill", e: "eraser", p: "pick" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const element = (id) => document.getElementById(id);
const map = element("map"), ring = element("ring"), image = element("image");
const context = map.getContext("2d");
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

const settings = await (await answerOf("settings")).json();
const { width, height, classes } = settings;
const Numbers = classes.some((one) => one.number > 255) ? Uint16Array : Uint8Array;
const known = new Map(classes.map((one) => [one.number, one]));
const colours = new Uint32Array(2 ** 16);
for (const { number, colour } of classes) {
  const bytes = new Uint8Array([...colour, 255]);
  colours[number] = new Uint32Array(bytes.buffer)[0];
}
// The stored map and style are used again only with the same kind of generator.
const KIND = `${width} ${height} ${settings.zLength} ${classes.map((one) => one.name)}`;

let labels = keptLabels() ?? (await firstScene());
let style = keptStyle() ?? { query: "seed=0", name: "" };
let past = [], future = [];
let tool = "brush";
let chosen = (classes.find((one) => one.name === "tree") ?? classes[0]).number;
let cursor = [width / 2, height / 2];

// ---- The server ----

async function answerOf(path, options) {
  const answer = await fetch(path, options).catch(() => {
    throw new Error("the server does not answer");
  });
  if (answer.ok) return answer;
  const words = await answer.json().then((body) => body.detail, () => answer.statusText);
  const error = new Error(typeof words === "string" ? words : "the request was wrong");
  error.status = answer.status;
  throw error;
}

async function firstScene() {
  const numbers = new Uint16Array(await (await answerOf("scene")).arrayBuffer());
  return Numbers.from(numbers);
}

// Only one request is on its way at a time. Strokes drawn in the meantime are sent together with the
// next one.
let wanted = 0, shown = -1, asking = false;

function changed() {
  wanted++;
  draw();
  follow();
}

async function follow() {
  if (asking) return;
  asking = true;
  element("result").ariaBusy = "true";
  while (shown !== wanted) {
    const asked = wanted;
    try {
      await ask();
      shown = asked;
    } catch (error) {
      const again = error.status === undefined || error.status === 503;
      say(`No image: ${error.message}${again ? "; retrying …" : ""}`, true);
      if (again) await pause(RETRY);
      else shown = asked;
    }
  }
  asking = false;
  element("result").ariaBusy = "false";
}

async function ask() {
  const start = performance.now();
  const query = settings.zLength === null ? "" : `?${style.query}`;
  const answer = await answerOf(`image${query}`, { method: "POST", body: labels });
  const blob = await answer.blob();
  const before = image.src;
  image.src = URL.createObjectURL(blob);
  await image.decode();
  if (before) URL.revokeObjectURL(before);
  const [, network] = /image;dur=([\d.]+)/.exec(answer.headers.get("Server-Timing"));
  const whole = performance.now() - start;
  say(`Image in ${Math.round(network)} ms, on the page after ${Math.round(whole)} ms`);
}

function say(words, isWrong = false) {
  element("status").textContent = words;
  element("status").classList.toggle("wrong", isWrong);
}

// ---- The map ----

const pixels = context.createImageData(width, height);

function draw() {
  const target = new Uint32Array(pixels.data.buffer);
  for (let place = 0; place < labels.length; place++) target[place] = colours[labels[place]];
  context.putImageData(pixels, 0, 0);
  element("undo").disabled = !past.length;
  element("redo").disabled = !future.length;
}

/** Begins a step that undo takes back. */
function remember() {
  past.push(labels.slice());
  if (past.length > MOST_STEPS) past.shift();
  future = [];
}

function step(from, to) {
  if (!from.length || line) return;
  to.push(labels);
  labels = from.pop();
  changed();
  keep();
}

function replace(numbers) {
  remember();
  labels = numbers;
  changed();
  keep();
}

const undo = () => step(past, future);
const redo = () => step(future, past);
const paintNumber = () => (tool === "eraser" ? settings.background : chosen);
const radius = () => element("size").value / 2;

/** Paints a line with a round brush. */
function stroke([x0, y0], [x1, y1]) {
  const r = radius(), number = paintNumber();
  const dx = x1 - x0, dy = y1 - y0, square = dx * dx + dy * dy;
  const top = Math.max(0, Math.floor(Math.min(y0, y1) - r));
  const bottom = Math.min(height - 1, Math.ceil(Math.max(y0, y1) + r));
  const left = Math.max(0, Math.floor(Math.min(x0, x1) - r));
  const right = Math.min(width - 1, Math.ceil(Math.max(x0, x1) + r));
  for (let y = top; y <= bottom; y++) {
    for (let x = left; x <= right; x++) {
      const px = x + 0.5 - x0, py = y + 0.5 - y0;
      const along = square ? Math.min(1, Math.max(0, (px * dx + py * dy) / square)) : 0;
      if ((px - along * dx) ** 2 + (py - along * dy) ** 2 <= r * r) labels[y * width + x] = number;
    }
  }
  // The smallest brush may miss the centres of all pixels.
  const x = Math.floor(x1), y = Math.floor(y1);
  if (x >= 0 && x < width && y >= 0 && y < height) labels[y * width + x] = number;
}

function fill([x, y]) {
  const start = Math.floor(y) * width + Math.floor(x);
  const before = labels[start], after = paintNumber();
  if (before === after || before === undefined) return;
  const waiting = [start];
  while (waiting.length) {
    const place = waiting.pop();
    if (labels[place] !== before) continue;
    labels[place] = after;
    if (place % width > 0) waiting.push(place - 1);
    if (place % width < width - 1) waiting.push(place + 1);
    waiting.push(place - width, place + width); // outside the map: undefined, never equal to before
  }
}

// ---- A stroke, by pointer or keys ----

let line = null; // the stroke being drawn: {first, last, before}

function begin(place) {
  if (tool === "pick") return choose(labels[Math.floor(place[1]) * width + Math.floor(place[0])]);
  remember();
  if (tool === "fill") {
    fill(place);
    changed();
    return keep();
  }
  line = { first: place, last: place, before: labels.slice() };
  stroke(place, place);
  changed();
}

function go(place) {
  if (!line) return;
  if (tool === "line") labels.set(line.before);
  stroke(tool === "line" ? line.first : line.last, place);
  line.last = place;
  changed();
}

function end() {
  if (!line) return;
  line = null;
  draw();
  keep();
}

function placeOf(event) {
  const box = map.getBoundingClientRect();
  const scale = box.width / width;
  const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
  return [Math.min(width - 0.01, Math.max(0, x)), Math.min(height - 0.01, Math.max(0, y))];
}

function showRing([x, y]) {
  const scale = map.getBoundingClientRect().width / width;
  const length = ["fill", "pick"].includes(tool) ? 8 : 2 * radius() * scale;
  ring.style.left = `${x * scale}px`;
  ring.style.top = `${y * scale}px`;
  ring.style.width = ring.style.height = `${Math.max(6, length)}px`;
  ring.hidden = false;
}

map.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  event.preventDefault();
  map.focus({ preventScroll: true });
  map.setPointerCapture(event.pointerId);
  hideHint();
  begin(placeOf(event));
});
map.addEventListener("pointermove", (event) => {
  if (!event.isPrimary) return;
  cursor = placeOf(event);
  showRing(cursor);
  const events = event.getCoalescedEvents?.() ?? [];
  for (const each of events.length ? events : [event]) go(placeOf(each));
});
for (const kind of ["pointerup", "pointercancel"]) {
  map.addEventListener(kind, (event) => event.isPrimary && end());
}
map.addEventListener("pointerleave", () => { ring.hidden = true; });
map.addEventListener("blur", () => { ring.hidden = true; });

map.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in ARROWS) {
    const far = event.shiftKey ? 10 : 2, [dx, dy] = ARROWS[event.key];
    const [x, y] = cursor;
    cursor = [Math.min(width - 1, Math.max(0, x + far * dx)), Math.min(height - 1, Math.max(0, y + far * dy))];
    go(cursor);
  } else if (event.key === " " || event.key === "Enter") {
    hideHint();
    if (!event.repeat && !line) begin(cursor);
    else if (!event.repeat) end(); // the second press ends the stroke
  } else if (event.key === "Escape") {
    end();
  } else {
    return;
  }
  event.preventDefault();
  showRing(cursor);
});

// ---- Controls ----

function choose(number) {
  chosen = number;
  for (const button of element("classes").children) {
    const is = Number(button.dataset.number) === number;
    button.ariaPressed = String(is);
    if (is) button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  if (tool === "eraser" || tool === "pick") use("brush");
}

function use(name) {
  end();
  tool = name;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.ariaPressed = String(button.dataset.tool === name);
  }
}

function listClasses() {
  for (const { number, name, colour } of classes) {
    const button = document.createElement("button"), swatch = document.createElement("i");
    button.type = "button";
    button.dataset.number = number;
    swatch.style.background = `rgb(${colour})`;
    button.append(swatch, name);
    button.addEventListener("click", () => choose(number));
    element("classes").append(button);
  }
  const search = element("search");
  search.hidden = classes.length < MANY;
  search.addEventListener("input", () => {
    const words = search.value.trim().toLowerCase();
    for (const button of element("classes").children) {
      button.hidden = !button.textContent.toLowerCase().includes(words);
    }
  });
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function saveImage() {
  if (image.src) download(await (await fetch(image.src)).blob(), "image.png");
}

async function openMap(file) {
  try {
    if (file.size > LARGEST_FILE) throw new Error("it is too large");
    const found = await readPng(new Uint8Array(await file.arrayBuffer()));
    const wrong = found.numbers.find((number) => !known.has(number));
    if (wrong !== undefined) throw new Error(`it has a ${wrong}, which is not a class here`);
    replace(resized(found));
  } catch (error) {
    say(`${file.name} was not opened: ${error.message}`, true);
  }
}

/** A map, resized to the size of this one by nearest neighbour. */
function resized(found) {
  const numbers = new Numbers(width * height);
  for (let y = 0, place = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * found.height) / height) * found.width;
    for (let x = 0; x < width; x++) {
      numbers[place++] = found.numbers[row + Math.floor(((x + 0.5) * found.width) / width)];
    }
  }
  return numbers;
}

// ---- Styles ----

let styles = 0; // requested so far: an answer to any but the last is out of date

function newZ() {
  if (settings.zLength === null) return;
  styles++;
  setStyle(`seed=${Math.floor(Math.random() * (settings.highestSeed + 1))}`, "");
}

function setStyle(query, name) {
  style = { query, name };
  store("style", JSON.stringify(style));
  showStyle();
  changed();
}

function showStyle() {
  element("style").hidden = !style.name;
  element("style").textContent = `Style: ${style.name}`;
}

async function openStyle(file) {
  const turn = ++styles;
  try {
    const most = settings.mostPhotographBytes;
    if (file.size > most) throw new Error(`it is larger than ${Math.floor(most / 2 ** 20)} MiB`);
    say(`Reading the style of ${file.name} …`);
    const { z } = await (await answerOf("style", { method: "POST", body: file })).json();
    if (turn === styles) setStyle(`z=${encodeURIComponent(z)}`, file.name);
  } catch (error) {
    say(`${file.name} was not opened: ${error.message}`, true);
  }
}

function hideHint() {
  element("hint").hidden = true;
  try {
    localStorage.setItem("understood", "yes");
  } catch { /* the browser may forbid it: then the hint appears again */ }
}

// A tab's map and style survive a reload. Other tabs have their own.
function store(what, text) {
  try {
    sessionStorage.setItem(`${what} ${KIND}`, text);
  } catch { /* the browser may forbid it: then a reload starts over */ }
}

function stored(what) {
  try {
    return sessionStorage.getItem(`${what} ${KIND}`);
  } catch {
    return null;
  }
}

function keep() {
  store("labels", Array.from(labels, (number) => String.fromCharCode(number)).join(""));
}

function keptLabels() {
  const text = stored("labels");
  return text && Numbers.from({ length: text.length }, (_, place) => text.charCodeAt(place));
}

function keptStyle() {
  return JSON.parse(stored("style"));
}

element("undo").addEventListener("click", undo);
element("redo").addEventListener("click", redo);
element("scene").addEventListener("click", () => {
  firstScene().then(replace, (error) => say(`The first scene was not loaded: ${error.message}`, true));
});
element("new-z").addEventListener("click", newZ);
element("save-image").addEventListener("click", saveImage);
element("save-map").addEventListener("click", async () => {
  download(await writePng(labels, width, height), "labels.png");
});
for (const [button, input, open] of [["open", "file", openMap], ["open-style", "photograph", openStyle]]) {
  element(button).addEventListener("click", () => element(input).click());
  element(input).addEventListener("change", (event) => {
    if (event.target.files.length) open(event.target.files[0]);
    event.target.value = "";
  });
}
element("understood").addEventListener("click", hideHint);
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => use(button.dataset.tool));
}

addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=search]")) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") (event.shiftKey ? redo : undo)();
    else if (key === "y") redo();
    else return;
    return event.preventDefault();
  }
  if (event.altKey) return;
  const size = element("size");
  if (key in KEYS) use(KEYS[key]);
  else if (key === "[") size.stepDown(2);
  else if (key === "]") size.stepUp(2);
  else if (key === "n") newZ();
  else if (key === "s") saveImage();
});

document.documentElement.style.setProperty("--aspect", width / height);
map.width = width;
map.height = height;
element("size").max = Math.round(width / 3);
element("size").value = Math.round(width / 12);
const ground = known.get(settings.background);
document.querySelector("[data-tool=eraser]").title = `Eraser (E): paints “${ground.name}”`;
element("new-z").hidden = settings.zLength === null;
element("open-style").hidden = settings.mostPhotographBytes === null;
showStyle();
element("note").textContent = settings.hasEdges
  ? "This generator also sees edges of instances: here, the borders between classes."
  : "";
listClasses();
choose(chosen);
use("brush");
try {
  element("hint").hidden = localStorage.getItem("understood") === "yes";
} catch {
  element("hint").hidden = false;
}
changed();
