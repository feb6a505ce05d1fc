const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const state = {axis: "steps", smoothing: 0, log: false, hidden: new Set()}, views = [];
const LEFT = 56, RIGHT = 26, TOP = 12, BOTTOM = 40;

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Where a sorted list has its last value that is not above x; at least 0.
function place(list, x) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (list[middle] <= x) low = middle; else high = middle - 1;
  }
  return low;
}

// A step of a run on the chosen axis; null where nobody knows it there.
function along(run, step) {
  if (state.axis === "steps") return step;
  const points = data.runs[run][state.axis];
  if (!points || !points[0].length) return null;
  const [steps, values] = points, i = Math.min(place(steps, step), steps.length - 2);
  if (i < 0 || steps[i + 1] === steps[i]) return values[0];
  const share = (step - steps[i]) / (steps[i + 1] - steps[i]);
  return values[i] + Math.min(1, Math.max(0, share)) * (values[i + 1] - values[i]);
}

function number(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  for (const [power, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= power && size >= 1e4) return +(value / power).toPrecision(digits) + sign;
  return String(+value.toPrecision(digits));
}

function duration(secs) {
  const whole = Math.round(secs), two = n => String(n).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

const axisText = x => state.axis === "time" ? duration(x) : state.axis === "steps" ? Math.round(x).toLocaleString("en")
  : number(x);
const axisTitle = () => ({steps: "step", tokens: "tokens", time: "wall time, h:mm:ss"})[state.axis];

function ticks(low, high, about, units, finest = 0) {
  const least = Math.max(finest, (high - low) / about), power = 10 ** Math.floor(Math.log10(least));
  const steps = units || [1, 2, 5, 10].map(factor => factor * power);
  const step = steps.find(each => each >= least * 0.999) || steps[steps.length - 1] * Math.ceil(least / steps.at(-1));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of [1, 2, 3, 5, 7]) found.push(factor * 10 ** power);
  const inside = found.filter(each => each >= low && each <= high);
  if (inside.length < 3) return ticks(low, high, 4);
  return inside.length <= 8 ? inside : inside.filter(each => /^[1]/.test(each.toExponential()));
}

const SECONDS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

// Exponential means of what came before and of what comes after, so that nothing is late; at the slider's end they reach
// over a tenth of the curve.
function smoothed(xs, ys) {
  const tau = (xs[xs.length - 1] - xs[0] || 1) * (state.smoothing / 100) ** 2 * 0.1;
  const mean = (xs, ys) => ys.reduce((out, y, i) => {
    out.push(i ? out[i - 1] + (1 - Math.exp(-Math.abs(xs[i] - xs[i - 1]) / tau)) * (y - out[i - 1]) : y);
    return out;
  }, []);
  const before = mean(xs, ys), after = mean([...xs].reverse(), [...ys].reverse()).reverse();
  return before.map((each, i) => (each + after[i]) / 2);
}

function drawn(line, xs, ys, isLog) {
  const x = [], y = [], step = [];
  for (let i = 0; i < xs.length; i++) {
    const at = along(line.run, xs[i]);
    if (at === null || (isLog && ys[i] <= 0)) continue;
    x.push(at); y.push(ys[i]); step.push(xs[i]);
  }
  return {line, x, y, step};
}

function draw(view) {
  const {plot, figure, svg} = view, width = Math.round(figure.clientWidth);
  view.width = width;
  if (!width) return;
  const height = plot.wide ? Math.min(320, Math.max(220, width / 2.6)) : 220, isLog = state.log && plot.log;
  const shown = plot.lines.filter(line => !state.hidden.has(line.run)).map(line => drawn(line, line.x, line.y, isLog))
    .filter(each => each.x.length);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  view.shown = shown; view.leave();
  if (!shown.length) {
    svg.append(element("text", {x: LEFT, y: 30}, "nothing to show on this axis"));
    return;
  }
  let [low, high, bottom, top] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const {x, y} of shown) {
    low = Math.min(low, x[0]); high = Math.max(high, x[x.length - 1]);
    for (const value of y) { if (value < bottom) bottom = value; if (value > top) top = value; }
  }
  if (!(high - low > 1e-9 * Math.abs(high))) { low -= 0.5; high += 0.5; }
  if (!(top - bottom > 1e-9 * Math.max(Math.abs(top), Math.abs(bottom)))) {
    const room = 0.05 * Math.abs(top) || 1;
    bottom -= room; top += room;
  }
  const up = isLog ? Math.log : value => value, floor = height - BOTTOM;
  const toX = x => LEFT + (x - low) / (high - low) * (width - LEFT - RIGHT);
  const toY = y => floor - (up(y) - up(bottom)) / (up(top) - up(bottom)) * (floor - TOP);
  view.toX = toX; view.toY = toY; view.floor = floor;
  const levels = (isLog ? logTicks(bottom, top) : ticks(bottom, top, plot.wide ? 8 : 6)).map(each => +each.toPrecision(12));
  const digits = [4, 5, 6, 7, 8].find(n => new Set(levels.map(each => number(each, n))).size === levels.length) || 9;
  for (const tick of levels) {
    const y = toY(tick).toFixed(1);
    svg.append(element("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y}),
      element("text", {x: LEFT - 6, y, dy: 4, "text-anchor": "end"}, number(tick, digits)));
  }
  for (const tick of ticks(low, high, Math.min(10, width / (state.axis === "time" ? 75 : 64)), state.axis === "time" && high - low > 4 ? SECONDS : null,
    state.axis === "time" ? 0 : 1)) {
    const x = toX(tick).toFixed(1);
    svg.append(element("line", {class: "grid", x1: x, x2: x, y1: floor, y2: floor + 5}),
      element("text", {x, y: floor + 18, "text-anchor": "middle"}, axisText(tick)));
  }
  svg.append(element("text", {x: (LEFT + width - RIGHT) / 2, y: height - 5, "text-anchor": "middle"}, axisTitle()));
  data.runs.forEach((run, index) => {
    if (state.hidden.has(index) || !shown.some(each => each.line.run === index)) return;
    if (index && run.marks.length > 30) return;
    for (const mark of run.marks) {
      const at = along(index, mark.x);
      if (at === null || at < low || at > high) continue;
      const link = element("a", {href: "#" + mark.at, class: "mark " + mark.kind}), x = toX(at).toFixed(1);
      const title = data.runs.length > 1 ? `${run.name}, ${mark.text}` : mark.text;
      link.append(element("title", {}, title), element("path", {d: `M${x} ${TOP}V${floor}`}),
        element("path", {class: "head", d: `M${x} ${TOP + 7}l-4-7h8z`}));
      svg.append(link);
    }
  });
  const path = (x, y) => "M" + x.map((each, i) => `${toX(each).toFixed(1)} ${toY(y[i]).toFixed(1)}`).join("L");
  for (const each of shown) {
    const {line, x, y} = each, behind = line.run && data.runs.length > 1 ? " behind" : "";
    const kinds = `line r${line.run}${line.label ? " second" : ""}${behind}`, isSmooth = state.smoothing > 0 && !line.dots;
    svg.append(element("path", {class: kinds + (isSmooth ? " raw" : ""), d: path(x, y)}));
    if (isSmooth) {
      const mean = line.mx ? drawn(line, line.mx, line.my, isLog) : each;
      each.smooth = {x: mean.x, y: smoothed(mean.x, mean.y)};
      svg.append(element("path", {class: kinds, d: path(each.smooth.x, each.smooth.y)}));
    }
    if (line.dots || x.length === 1) {
      const dots = element("g", {class: `dots r${line.run}`});
      x.forEach((at, i) => dots.append(element("circle", {cx: toX(at).toFixed(1), cy: toY(y[i]).toFixed(1), r: 2.6})));
      svg.append(dots);
    }
  }
}

function nearest(list, x) {
  const i = place(list, x);
  return i + 1 < list.length && list[i + 1] - x < x - list[i] ? i + 1 : i;
}

// Shows the values of all lines near x.
function show(view, x) {
  const {svg, tip, toX, toY, floor, shown, figure, plot} = view;
  if (!shown || !shown.length) return;
  view.extra.replaceChildren();
  svg.append(view.extra);
  const front = shown[shown.length - 1], index = nearest(front.x, x), at = front.x[index];
  view.index = index;
  view.extra.append(element("line", {class: "cursor", x1: toX(at), x2: toX(at), y1: TOP, y2: floor}));
  const head = document.createElement("div");
  head.textContent = state.axis === "steps" ? `step ${front.step[index].toLocaleString("en")}`
    : `${axisText(at)}${state.axis === "tokens" ? " tokens" : ""}, step ${front.step[index].toLocaleString("en")}`;
  tip.replaceChildren(head);
  for (const each of [...shown].reverse()) {
    if (at < each.x[0] - (each.x[1] - each.x[0] || 0) || at > each.x[each.x.length - 1] + 1e-9 * Math.abs(at)) continue;
    const i = nearest(each.x, at), row = document.createElement("div"), swatch = document.createElement("i");
    view.extra.append(element("circle", {class: `spot r${each.line.run}`, cx: toX(each.x[i]), cy: toY(each.y[i]), r: 4}));
    swatch.className = `swatch r${each.line.run}`;
    const names = [data.runs.length > 1 ? data.runs[each.line.run].name : "", each.line.label].filter(Boolean).join(", ");
    const where = each.step[i] !== front.step[index] && each.line.dots ? ` at ${each.step[i].toLocaleString("en")}` : "";
    const mean = each.smooth ? `, mean ${number(each.smooth.y[nearest(each.smooth.x, at)])}` : "";
    row.append(swatch, `${names ? names + ": " : ""}${number(each.y[i])}${where}${mean}`);
    tip.append(row);
  }
  tip.hidden = false;
  const left = toX(at) + 12, room = figure.clientWidth - tip.offsetWidth;
  tip.style.left = Math.max(0, left > room ? Math.min(room, toX(at) - 12 - tip.offsetWidth) : left) + "px";
  tip.style.top = svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + TOP + 10 + "px";
}

for (const plot of data.plots) {
  const figure = $(plot.key), svg = figure.querySelector("svg");
  if (!svg) continue;
  const tip = document.createElement("div"), view = {plot, figure, svg, tip, extra: element("g", {})};
  tip.className = "tip"; tip.hidden = true; tip.setAttribute("role", "status");
  figure.append(tip);
  view.leave = () => { tip.hidden = true; view.extra.remove(); };
  svg.setAttribute("role", "group"); svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", event => {
    if (!view.shown || !view.shown.length) return;
    const x = event.clientX - svg.getBoundingClientRect().left, {x: points} = view.shown[view.shown.length - 1];
    const [first, last] = [view.toX(points[0]), view.toX(points[points.length - 1])];
    show(view, points[0] + (x - first) / (last - first || 1) * (points[points.length - 1] - points[0]));
  });
  svg.addEventListener("pointerleave", view.leave);
  svg.addEventListener("blur", view.leave);
  svg.addEventListener("keydown", event => {
    const points = view.shown && view.shown.length ? view.shown[view.shown.length - 1].x : [];
    const by = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[event.key];
    if (event.key === "Escape") view.leave();
    if (!by || !points.length || event.target !== svg) return;
    event.preventDefault();
    const start = tip.hidden ? (by < 0 ? points.length : -1) : view.index, far = event.shiftKey ? points.length / 20 : 1;
    show(view, points[Math.min(points.length - 1, Math.max(0, Math.round(start + by * far)))]);
  });
  views.push(view);
  new ResizeObserver(() => { if (Math.round(figure.clientWidth) !== view.width) draw(view); }).observe(figure);
}

const drawAll = () => views.forEach(draw);
$("controls").hidden = false;
for (const id of ["axis", "smoothing", "log"]) $(id).addEventListener("input", () => {
  state.axis = $("axis").value; state.smoothing = +$("smoothing").value; state.log = $("log").checked;
  drawAll();
});
for (const box of document.querySelectorAll("#legend input")) {
  box.hidden = data.runs.length < 2;
  box.addEventListener("input", () => {
    state.hidden[box.checked ? "delete" : "add"](+box.value);
    drawAll();
  });
}
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", event => event.preventDefault());

for (const heat of data.heats) {
  const box = $(heat.key), form = box.querySelector("form"), which = box.querySelector(".which");
  const slider = box.querySelector(".step"), cells = [...box.querySelectorAll("td.heat")];
  const heads = [...box.querySelectorAll("thead th")], width = heat.of.length;
  const update = () => {
    const values = heat.values[+slider.value], step = heat.steps[+slider.value].toLocaleString("en");
    slider.setAttribute("aria-valuetext", "step " + step);
    box.querySelector(".at").textContent = step;
    const isShown = column => !heat.of[column] || heat.of[column] === which.value;
    heads.forEach((head, column) => { head.hidden = !isShown(column); });
    cells.forEach((cell, i) => {
      const value = values[i], span = heat.spans[i % width];
      cell.hidden = !isShown(i % width);
      cell.textContent = value === null ? "" : number(value, 3);
      const [low, high] = span ? span.map(Math.log) : [0, 0];
      const share = high > low ? (Math.log(Math.abs(value)) - low) / (high - low) : 0.5;
      cell.style.setProperty("--k", value && span ? share.toFixed(3) : 0);
    });
  };
  form.hidden = false;
  slider.addEventListener("input", update);
  if (which) which.addEventListener("input", update);
  update();
}
