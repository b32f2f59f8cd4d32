"use strict";
// Asks once a second for the samples that are new, and draws them. Only text is put into the page, never markup.
const SPAN_S = 180, WIDTH = 600, HEIGHT = 100, EVERY_MS = 1000;
const SVG = "http://www.w3.org/2000/svg";
const page = { samples: [], now: 0, last: null, cards: new Map() };

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter(child => child !== null));
  return made;
}

function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return Number(value.toPrecision(digits)).toString();
}

function scaled(value, unit) {
  if (value === null) return ["–", unit];
  for (const [prefix, size] of [["M", 1e6], ["k", 1e3]]) if (value >= 10 * size) return [figure(value / size), prefix + unit];
  return [figure(value), unit];
}

function duration(ms) {
  return ms !== null && ms >= 10000 ? [figure(ms / 1000), "s"] : [figure(ms), "ms"];
}

function number(value, unit, name) {
  return element("div", {}, element("b", {}, value, element("small", {}, unit)), element("span", {}, name));
}

// A strip chart. Each series: {name, of(sample), unit, top, bottom, step, fill}; values between bottom and top.
class Chart {
  constructor(classes) {
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.paths = {};
    for (const name of ["rule", ...classes, "cursor"]) {
      this.paths[name] = this.svg.appendChild(document.createElementNS(SVG, "path"));
      this.paths[name].setAttribute("class", name);
    }
    this.paths.rule.setAttribute("d", `M0 0H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT}H${WIDTH}`);
    this.tip = element("div", { class: "tip" });
    this.root = element("figure", { class: "chart" }, this.svg, this.tip);
    this.series = [];
    this.root.addEventListener("mousemove", event => {
      this.pointer = (event.clientX - this.root.getBoundingClientRect().left) / this.root.clientWidth;
      this.point();
    });
  }

  draw(series) {
    this.series = series;
    const x = sample => (1 + (sample.t - page.now) / SPAN_S) * WIDTH;
    for (const { name, of, top, bottom = 0, step, fill } of series) {
      const y = value => HEIGHT * (1 - (value - bottom) / (top - bottom || 1));
      let line = "", area = "", start = null, end = 0, level = 0;
      const close = () => { if (start !== null) area += `V${HEIGHT}H${start}Z`; start = null; };
      for (const sample of page.samples) {
        const value = of(sample);
        if (value === null || value === undefined) { close(); continue; }
        const here = x(sample).toFixed(1), there = y(Math.min(Math.max(value, bottom), top)).toFixed(1);
        const piece = start === null ? `M${here} ${there}` : step ? `H${here}V${there}` : `L${here} ${there}`;
        line += piece;
        area += start === null ? `M${here} ${HEIGHT}V${there}` : piece;
        start ??= here;
      }
      close();
      this.paths[name].setAttribute("d", line);
      if (fill) this.paths.fill.setAttribute("d", area);
    }
    if (this.root.matches(":hover")) this.point();
  }

  objective(value, top) {
    const height = (HEIGHT * (1 - value / top)).toFixed(1);
    this.paths.objective.setAttribute("d", value === null ? "" : `M0 ${height}H${WIDTH}`);
  }

  point() {
    const wanted = page.now - (1 - this.pointer) * SPAN_S;
    const near = page.samples.reduce((a, b) => a && Math.abs(a.t - wanted) < Math.abs(b.t - wanted) ? a : b, null);
    if (near === null) return;
    const place = 1 + (near.t - page.now) / SPAN_S;
    this.paths.cursor.setAttribute("d", `M${place * WIDTH} 0V${HEIGHT}`);
    const told = this.series.map(({ label, of, unit }) => `${label} ${figure(of(near))} ${unit}`.trim());
    this.tip.textContent = [`${Math.round(page.now - near.t)} s ago`, ...told].join(" · ");
    this.tip.style.left = place > 0.5 ? "auto" : `${100 * place + 1}%`;
    this.tip.style.right = place > 0.5 ? `${100 * (1 - place) + 1}%` : "auto";
  }
}

function legend(...entries) {
  return element("div", { class: "legend" }, ...entries.map(([name, text]) =>
    element("span", {}, element("i", { class: name }), text)));
}

// The top of a chart: a round number above all but the rarest values, so that one outlier does not flatten the rest.
function ceiling(values, least) {
  const known = values.filter(value => value !== null).sort((a, b) => a - b);
  return roundUp(1.2 * Math.max(least, known[Math.floor(0.97 * known.length)] ?? 0));
}

// A card that stays while its figures change.
function card(key, home, classes, entries) {
  if (!page.cards.has(key)) {
    const head = element("div", { class: "line" }), figures = element("div", { class: "figures" });
    const chart = new Chart(classes);
    const left = element("span"), right = element("span");
    const root = element("article", { class: "card" }, head, figures, legend(...entries), chart.root,
      element("div", { class: "scale" }, left, element("span", {}, "3 minutes"), right));
    document.getElementById(home).append(root);
    page.cards.set(key, { head, figures, chart, left, right });
  }
  return page.cards.get(key);
}

function roundUp(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return size * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(step => step * size >= value);
}

function showLatency(key, name, now, objective) {
  const { head, figures, chart, left, right } = card(key, "latencies", ["objective", "lower", "upper"],
    [["upper", "95th percentile"], ["lower", "median"], ...(objective === null ? [] : [["objective", "objective"]])]);
  const within = now.within === null ? null : element("span", { class: `badge ${now.within >= 0.95 ? "good" : "bad"}` },
    `${(100 * now.within).toFixed(1)} % ≤ ${duration(objective).join(" ")}`);
  head.replaceChildren(element("h3", {}, name), within ?? element("span", { class: "badge" }, "no objective"));
  figures.replaceChildren(...[50, 95, 99].map(share => number(...duration(now[`p${share}_ms`]), `p${share}`)));
  const top = ceiling(page.samples.map(sample => sample[key].p95_ms), objective ?? 1e-3);
  chart.draw([
    { name: "upper", label: "p95", unit: "ms", top, of: sample => sample[key].p95_ms },
    { name: "lower", label: "p50", unit: "ms", top, of: sample => sample[key].p50_ms }]);
  chart.objective(objective, top);
  left.textContent = `0 to ${duration(top).join(" ")}`;
  right.textContent = `${figure(now.count)} in the last minute`;
}

function showPower(power, perToken, energy) {
  const { head, figures, chart, left, right } = card("power", "latencies", ["fill", "batch", "power"],
    [["power", "power of all GPUs"], ["batch", "joules a token"]]);
  head.replaceChildren(element("h3", {}, "Power and energy"),
    element("span", { class: "badge" }, page.last.simulated ? "modelled" : "measured"));
  figures.replaceChildren(number(...scaled(power, "W"), "power"), number(figure(perToken), "J", "a token"),
    number(...scaled(energy, "J"), "energy"));
  const watts = sample => sample.workers.reduce((sum, worker) => sum + (worker[2] ?? 0), 0);
  const most = ceiling(page.samples.map(watts), 1);
  const joules = ceiling(page.samples.map(sample => sample.joules_per_token), 1e-6);
  chart.draw([
    { name: "power", label: "power", unit: "W", top: most, of: watts },
    { name: "batch", label: "a token", unit: "J", top: joules, fill: true, of: sample => sample.joules_per_token }]);
  left.textContent = `0 to ${scaled(most, "W").join(" ")}`;
  right.textContent = `0 to ${figure(joules)} J a token`;
}

function showWorker(worker, index) {
  const { head, figures, chart, left, right } = card(`worker ${worker.id}`, "workers",
    ["fill", "batch", "clock"], [["clock", "clock, MHz"], ["batch", "requests in a step"]]);
  const kind = worker.trouble !== null ? "bad" : worker.mode === "auto" ? "good" : "note";
  const mode = worker.trouble ?? { auto: "controller", set: "pinned", unset: "not controlled" }[worker.mode];
  head.replaceChildren(
    element("h3", {}, worker.id, element("span", { class: "badge" },
      worker.phase === "both" ? "prefill and decode" : worker.phase)),
    element("span", { class: `badge ${worker.freq_mhz === null ? "" : kind}` }, worker.freq_mhz === null ? "no GPU" : mode));
  figures.replaceChildren(
    ...(worker.freq_mhz === null ? [] : [number(figure(worker.freq_mhz), "MHz", "clock")]),
    number(figure(worker.running), "", "in a step"),
    number(figure(worker.waiting), "", "waiting"),
    ...(worker.power_w === null ? [] : [number(figure(worker.power_w), "W", "power"),
      number(...scaled(worker.energy_j, "J"), "energy"), number(figure(worker.switches), "", "clock changes")]));
  const clocks = [...worker.freqs_mhz, ...page.samples.map(sample => sample.workers[index]?.[0] ?? null)].filter(Boolean);
  const [low, high] = clocks.length ? [Math.min(...clocks), Math.max(...clocks)] : [0, 1];
  const pad = Math.max(0.12 * (high - low), 25);
  const most = ceiling(page.samples.map(sample => sample.workers[index]?.[1] ?? 0), 4);
  chart.draw([
    { name: "clock", label: "clock", unit: "MHz", step: true, bottom: low - pad, top: high + pad,
      of: sample => sample.workers[index]?.[0] ?? null },
    { name: "batch", label: "batch", unit: "", step: true, fill: true, top: most,
      of: sample => sample.workers[index]?.[1] ?? null }]);
  left.textContent = clocks.length ? `${figure(low)} to ${figure(high)} MHz` : "";
  right.textContent = `0 to ${figure(most)} requests`;
}

function show(data) {
  page.last = data;
  page.now = data.now;
  page.samples = page.samples.concat(data.samples).filter(sample => sample.t > data.now - SPAN_S);
  const status = document.getElementById("status");
  status.textContent = data.trouble ?? "serving";
  status.className = `badge ${data.trouble === null ? "good live" : "bad"}`;
  document.getElementById("about").replaceChildren("jaxlab · VoltanaLLM", ...(data.simulated
    ? [" · ", element("span", { class: "badge note" }, "simulated GPUs: clocks, power and energy are a model's")] : []));
  const latest = page.samples.at(-1) ?? {};
  const metered = data.workers.filter(worker => worker.power_w !== null);
  const power = metered.length ? metered.reduce((sum, worker) => sum + worker.power_w, 0) : null;
  document.getElementById("tiles").replaceChildren(
    number(figure(latest.tokens_per_s ?? null), "", "tokens/s"),
    number(figure(data.under_way), "", "under way"),
    number(figure(latest.waiting ?? 0), "", "waiting"),
    number(figure(data.free_pages), "", "free pages"),
    number(...scaled(data.finished, ""), "answered"),
    number(...scaled(data.generated, ""), "tokens"),
    ...(power === null ? [] : [number(...scaled(power, "W"), "power"),
      number(figure(latest.joules_per_token ?? null), "J", "a token")]));
  showLatency("ttft", "Time to first token", data.ttft, data.objectives.ttft_ms);
  showLatency("itl", "Inter-token latency", data.itl, data.objectives.itl_ms);
  if (power !== null) showPower(power, latest.joules_per_token ?? null, data.energy_j);
  data.workers.forEach(showWorker);
}

async function ask() {
  try {
    const answer = await fetch(`dashboard/data?since=${page.now}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const data = await answer.json();
    if (data.now < page.now) location.reload();  // another server
    show(data);
  } catch (error) {
    const status = document.getElementById("status");
    status.textContent = `no answer: ${error.message}`;
    status.className = "badge bad";
  }
  setTimeout(ask, EVERY_MS);
}

ask();
