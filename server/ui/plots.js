// What the server is doing: its metrics each second, for the last two minutes, while the tab is looked at.

import { metrics } from "./api.js";
import { element } from "./markdown.js";

const SECONDS = 120;
const WIDTH = 320;
const HEIGHT = 90;
const SVG = "http://www.w3.org/2000/svg";

const PLOTS = [
  { title: "Generated", unit: "tok/s", series: [["tokens", rate("nibble_generation_tokens_total")]] },
  { title: "Prompts", unit: "tok/s", series: [["tokens", rate("nibble_prompt_tokens_total")]] },
  {
    title: "Time to first token", unit: "ms",
    series: [["half", quantile("nibble_time_to_first_token_seconds_bucket", 0.5)],
      ["95 %", quantile("nibble_time_to_first_token_seconds_bucket", 0.95)]],
  },
  {
    title: "Between tokens", unit: "ms",
    series: [["half", quantile("nibble_inter_token_latency_seconds_bucket", 0.5)],
      ["95 %", quantile("nibble_inter_token_latency_seconds_bucket", 0.95)]],
  },
  { title: "KV cache in use", unit: "%", most: 100, series: [["blocks", percent("nibble_kv_cache_usage_perc")]] },
  {
    title: "Requests", unit: "",
    series: [["running", value("nibble_num_requests_running")], ["waiting", value("nibble_num_requests_waiting")]],
  },
];

function value(name) {
  return (now) => now.values.get(name) ?? 0;
}

function percent(name) {
  return (now) => 100 * (now.values.get(name) ?? 0);
}

function rate(name) {
  return (now, before, seconds) =>
    before ? Math.max(0, ((now.values.get(name) ?? 0) - (before.values.get(name) ?? 0)) / seconds) : 0;
}

// Of what came since the last look, in milliseconds; null where nothing came.
function quantile(name, share) {
  return (now, before) => {
    const old = new Map(before?.buckets.get(name) ?? []);
    const counts = (now.buckets.get(name) ?? []).map(([le, count]) => [le, count - (old.get(le) ?? 0)]);
    counts.sort((a, b) => a[0] - b[0]);
    const total = counts.at(-1)?.[1] ?? 0;
    if (!before || !total) return null;
    let low = 0;
    let below = 0;
    for (const [le, count] of counts) {
      if (count >= share * total) {
        if (le === Infinity) return 1000 * low;
        return 1000 * (low + ((le - low) * (share * total - below)) / (count - below || 1));
      }
      [low, below] = [le, count];
    }
    return null;
  };
}

function figure(plot) {
  const now = element("span", { className: "now" });
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const axis = document.createElementNS(SVG, "path");
  axis.setAttribute("class", "axis");
  axis.setAttribute("d", `M0 ${HEIGHT - 1}H${WIDTH}`);
  svg.append(axis);
  const lines = plot.series.map((_, i) => {
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("class", `line-${i + 1}`);
    line.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(line);
    return line;
  });
  const legend = element("div", { className: "legend" });
  const top = element("span");
  const caption = element("figcaption", {}, plot.title, top);
  return { node: element("figure", {}, caption, now, svg, legend), now, svg, lines, legend, top };
}

function shown(number, unit) {
  if (number === null || number === undefined) return "–";
  const text = number >= 100 || Number.isInteger(number) ? Math.round(number) : number.toFixed(1);
  return unit ? `${text} ${unit}` : `${text}`;
}

function draw(plot, parts, points) {
  const known = points.flat().filter((point) => point !== null);
  const most = plot.most ?? Math.max(1, ...known);
  points.forEach((series, i) => {
    let path = "";
    let pen = "M";
    series.forEach((point, t) => {
      if (point === null) return;
      const x = WIDTH - ((series.length - 1 - t) * WIDTH) / SECONDS;
      path += `${pen}${x.toFixed(1)} ${(HEIGHT - 2 - (point / most) * (HEIGHT - 6)).toFixed(1)}`;
      pen = "L";
    });
    parts.lines[i].setAttribute("d", path);
  });
  const last = points.map((series) => series.findLast((point) => point !== null));
  parts.now.textContent = shown(last[0], plot.unit);
  parts.top.textContent = `up to ${shown(most, plot.unit)}`;
  const named = plot.series.map(([name], i) => `${name} ${shown(last[i], plot.unit)}`).join(", ");
  parts.legend.textContent = plot.series.length > 1 ? named : "";
  parts.svg.setAttribute("aria-label", `${plot.title}: ${named}`);
}

export function start() {
  const panel = document.getElementById("server");
  const figures = PLOTS.map(figure);
  document.getElementById("plots").replaceChildren(...figures.map((parts) => parts.node));
  const history = PLOTS.map((plot) => plot.series.map(() => []));
  let before = null;
  let looked = 0;
  setInterval(async () => {
    if (panel.hidden || document.hidden) { before = null; return; }
    const state = document.getElementById("server-state");
    try {
      const now = await metrics();
      const seconds = (performance.now() - looked) / 1000;
      looked = performance.now();
      PLOTS.forEach((plot, p) => {
        plot.series.forEach(([, read], s) => {
          history[p][s].push(read(now, before, seconds));
          if (history[p][s].length > SECONDS) history[p][s].shift();
        });
        draw(plot, figures[p], history[p]);
      });
      before = now;
      const running = now.values.get("nibble_num_requests_running") ?? 0;
      const waiting = now.values.get("nibble_num_requests_waiting") ?? 0;
      state.textContent = `${running} in flight, ${waiting} waiting. The last two minutes.`;
    } catch (error) {
      state.textContent = `The server does not answer: ${error.message}`;
    }
  }, 1000);
}
