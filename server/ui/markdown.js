// A little Markdown as DOM nodes: what a model writes never becomes HTML.

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function markdown(text) {
  const fragment = document.createDocumentFragment();
  const parts = text.split(/^```(.*)\n?/m);
  for (let i = 0; i < parts.length; i += 2) {
    if (i % 4 === 0) fragment.append(...blocks(parts[i]));
    else fragment.append(code(parts[i]));
  }
  return fragment;
}

function code(text) {
  const copy = element("button", { type: "button", className: "quiet", textContent: "Copy" });
  copy.addEventListener("click", () => navigator.clipboard.writeText(text));
  return element("pre", { tabIndex: 0 }, element("code", { textContent: text }), copy);
}

function* blocks(text) {
  for (const block of text.split(/\n{2,}/)) {
    const lines = block.split("\n").filter((line) => line.trim());
    if (!lines.length) continue;
    const heading = /^#{1,6} (.*)/.exec(lines[0]);
    if (heading) {
      yield element("h4", {}, ...inline(heading[1]));
      lines.shift();
      if (!lines.length) continue;
    }
    if (lines.every((line) => /^\s*[-*] /.test(line))) yield list("ul", lines, /^\s*[-*] /);
    else if (lines.every((line) => /^\s*\d+[.)] /.test(line))) yield numbered(lines);
    else yield paragraph(lines);
  }
}

function list(tag, lines, mark) {
  return element(tag, {}, ...lines.map((line) => element("li", {}, ...inline(line.replace(mark, "")))));
}

// Items with a blank line between them come one by one: each goes on counting where the model does.
function numbered(lines) {
  const made = list("ol", lines, /^\s*\d+[.)] /);
  made.start = parseInt(lines[0], 10);
  return made;
}

function paragraph(lines) {
  const made = element("p");
  lines.forEach((line, i) => {
    if (i) made.append(element("br"));
    made.append(...inline(line));
  });
  return made;
}

function* inline(text) {
  for (const piece of text.split(/(`[^`]+`|\*\*[^*]+\*\*)/)) {
    if (/^`.+`$/.test(piece)) yield element("code", { textContent: piece.slice(1, -1) });
    else if (/^\*\*.+\*\*$/.test(piece)) yield element("strong", { textContent: piece.slice(2, -2) });
    else if (piece) yield piece;
  }
}
