// The accuracy card that a conversion wrote beside its weights, as a picture.

import { ApiError, json } from "./api.js";
import { element } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";
// As wide as the figure will be, so that text keeps its size.
const WIDTH = Math.min(1006, innerWidth - 76);
const LABELS = WIDTH < 500 ? 135 : 180;

function node(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// rows: [{ label, values: [number, ...] }]; bars of one row under each other.
function bars(title, rows, show, names) {
  const height = (count) => 20 * count + 14;
  const total = rows.reduce((sum, row) => sum + height(row.values.length), 0);
  const most = Math.max(...rows.flatMap((row) => row.values), 1e-9);
  const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${total}`, role: "img", "aria-label": title });
  let y = 0;
  for (const row of rows) {
    svg.append(node("text", { x: 0, y: y + 15 }, row.label));
    row.values.forEach((value, i) => {
      const width = Math.max(2, (value / most) * (WIDTH - LABELS - 64));
      svg.append(node("rect", { class: `bar-${i + 1}`, x: LABELS, y: y + 2, width, height: 15, rx: 3 }));
      svg.append(node("text", { class: "minor", x: LABELS + 8 + width, y: y + 15 }, show(value)));
      y += 20;
    });
    y += 14;
  }
  const legend = names.length > 1 ? ` (${names.join(", then ")})` : "";
  return element("figure", {}, element("figcaption", {}, title + legend), svg);
}

function fact(name, value) {
  return element("li", {}, element("strong", { textContent: value }), name);
}

function picture(card) {
  const made = [];
  const ratio = card.bytes_after / card.bytes_before;
  made.push(element("ul", { className: "facts" },
    fact("of", card.base_model.split("/").pop()),
    fact("scheme", card.scheme),
    fact("bits a weight", card.bits_per_weight.toFixed(2)),
    fact(`of ${Math.round(card.bytes_before / 1e6)} MB (${Math.round(100 * ratio)} %)`, `${Math.round(card.bytes_after / 1e6)} MB`)));
  const measured = card.evaluation ?? [];
  if (!measured.length) {
    made.push(element("p", { textContent: "This conversion was not measured: `nibble evaluate ORIGINAL QUANTIZED` does it." }));
  } else {
    const of = (...names) => measured.map((quality) => ({
      label: quality.domain, values: names.map((name) => quality[name]).filter((value) => value !== null && value !== undefined),
    }));
    made.push(bars("KL divergence from the original, nats a token: less is better",
      of("kl_mean", "kl_mean_int8"), (value) => value.toFixed(3), ["as it is", "as a CPU serves it, activations in int8"]));
    made.push(bars("Perplexity", of("perplexity_reference", "perplexity"), (value) => value.toFixed(2), ["original", "quantized"]));
    made.push(bars("Same most probable token", of("top1_agreement"), (value) => `${(100 * value).toFixed(1)} %`, [""]));
  }
  const layers = Object.entries(card.layer_error ?? {}).sort((a, b) => b[1] - a[1]).slice(0, 12);
  if (layers.length) {
    made.push(bars("Layers with the greatest relative error", layers.map(([label, value]) => (
      { label: label.replace(/^model\.(language_model\.)?layers\./, ""), values: [value] })), (value) => value.toPrecision(3), [""]));
  }
  for (const note of card.notes ?? []) made.push(element("p", { className: "hint", textContent: note }));
  return made;
}

export async function start(model) {
  const place = document.getElementById("card-content");
  try {
    place.replaceChildren(...picture(await json(`/v1/models/${model.id}/card`)));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    place.replaceChildren(element("p", { textContent: error.message }));
  }
}
