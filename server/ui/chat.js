// Conversations: kept in this browser, written as they stream, to be gone on from at any message.

import { chat } from "./api.js";
import { element, markdown } from "./markdown.js";

const STORE = "nibble.conversations";
const MOST = 30;
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const $ = (id) => document.getElementById(id);

let conversations = JSON.parse(localStorage.getItem(STORE) ?? "[]");
let current = conversations[0] ?? fresh();
let attached = [];
let running = null; // an AbortController
let model = null;

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Date.now()), title: "", messages: [] };
}

function keep() {
  conversations = [current, ...conversations.filter((one) => one.id !== current.id)]
    .filter((one) => one.messages.length)
    .slice(0, MOST);
  try {
    localStorage.setItem(STORE, JSON.stringify(conversations));
  } catch {
    $("status").textContent = "This browser has no room left: the conversation is not kept.";
  }
  listConversations();
}

function listConversations() {
  const rows = conversations.map((one) => {
    const open = element("button", { type: "button", className: "quiet open", textContent: one.title });
    open.addEventListener("click", () => show(one));
    open.addEventListener("dblclick", () => rename(one));
    const drop = element("button", { type: "button", className: "quiet", textContent: "×" });
    drop.setAttribute("aria-label", `Delete ${one.title}`);
    drop.addEventListener("click", () => remove(one));
    const row = element("li", {}, open, drop);
    row.setAttribute("aria-current", String(one.id === current.id));
    return row;
  });
  $("conversations").replaceChildren(...rows);
}

function rename(one) {
  const title = prompt("Name of the conversation", one.title);
  if (title) {
    one.title = title;
    keep();
  }
}

function remove(one) {
  conversations = conversations.filter((other) => other.id !== one.id);
  if (one.id === current.id) current = fresh();
  keep();
  showMessages();
}

function show(one) {
  running?.abort();
  current = one;
  $("history").classList.remove("shown");
  listConversations();
  showMessages();
  $("input").focus();
}

function showMessages() {
  $("messages").replaceChildren(...current.messages.map((_, index) => row(index)));
  if (!current.messages.length) {
    const words = element("strong", { textContent: "What is it?" });
    const told = model ? `${model.id}, ${model.quantization}` : "";
    $("messages").append(element("li", { className: "welcome" }, words, told));
  }
  scrollDown();
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function row(index) {
  const message = current.messages[index];
  const made = $("message").content.cloneNode(true).firstElementChild;
  made.classList.add(message.error ? "error" : message.role);
  made.querySelector("h3").textContent = message.role === "user" ? "You" : "Answer";
  fill(made, message);
  const on = (name, act) => made.querySelector(name).addEventListener("click", act);
  on(".copy", () => navigator.clipboard.writeText(message.content));
  on(".edit", () => edit(index));
  on(".retry", () => retry(index));
  made.querySelector(".edit").hidden = message.role !== "user";
  made.querySelector(".retry").hidden = message.role === "user";
  return made;
}

function fill(made, message) {
  made.querySelector(".content").replaceChildren(markdown(message.content));
  made.querySelector(".stats").textContent = message.stats ?? "";
  const thought = made.querySelector(".reasoning");
  thought.hidden = !message.reasoning;
  thought.lastElementChild.textContent = message.reasoning ?? "";
  const images = (message.images ?? []).map((src) => element("img", { src, alt: "Attached image" }));
  made.querySelector(".images").replaceChildren(...images);
  const calls = (message.calls ?? []).map((call) =>
    element("div", { className: "call" }, element("code", { textContent: `${call.name}(${call.arguments})` })));
  made.querySelector(".calls").replaceChildren(...calls);
}

function edit(index) {
  if (running) return;
  const message = current.messages[index];
  $("input").value = message.content;
  attached = message.images ?? [];
  showAttached();
  current.messages.length = index;
  showMessages();
  $("input").focus();
}

function retry(index) {
  if (running) return;
  current.messages.length = index;
  showMessages();
  answer();
}

function settings() {
  const form = new FormData($("settings"));
  const given = {};
  for (const name of NUMBERS) {
    if (form.get(name) !== "") given[name] = Number(form.get(name));
  }
  return { system: form.get("system"), given };
}

function forApi(message) {
  if (!message.images?.length) return { role: message.role, content: message.content };
  const images = message.images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: message.role, content: [...images, { type: "text", text: message.content }] };
}

async function answer() {
  const { system, given } = settings();
  const messages = current.messages.filter((message) => !message.error).map(forApi);
  if (system) messages.unshift({ role: "system", content: system });
  const message = { role: "assistant", content: "", reasoning: "", calls: [] };
  current.messages.push(message);
  const conversation = current;
  const made = row(current.messages.length - 1);
  $("messages").querySelector(".welcome")?.remove();
  $("messages").append(made);
  running = new AbortController();
  busy(true);
  try {
    await read(chat({ model: model.id, messages, ...given }, running.signal), message, made);
    $("status").textContent = "Answered.";
  } catch (error) {
    if (error.name === "AbortError") {
      $("status").textContent = "Stopped.";
    } else {
      conversation.messages.push({ role: "assistant", error: true, content: error.message });
      $("status").textContent = error.message;
    }
    if (!message.content && !message.reasoning && !message.calls.length) {
      conversation.messages.splice(conversation.messages.indexOf(message), 1);
    }
  }
  running = null;
  busy(false);
  keep();
  if (conversation === current) showMessages();
}

async function read(events, message, made) {
  const begin = performance.now();
  let first = null;
  let drawn = 0;
  for await (const event of events) {
    const delta = event.choices[0]?.delta ?? {};
    if (delta.content || delta.reasoning_content || delta.tool_calls) first ??= performance.now();
    message.content += delta.content ?? "";
    message.reasoning += delta.reasoning_content ?? "";
    for (const call of delta.tool_calls ?? []) {
      message.calls[call.index] ??= { name: "", arguments: "" };
      message.calls[call.index].name += call.function.name ?? "";
      message.calls[call.index].arguments += call.function.arguments ?? "";
    }
    if (event.usage) message.stats = stats(event.usage, begin, first ?? begin);
    if (performance.now() - drawn > 50) { // writing a long answer anew for each token would be quadratic
      const list = $("messages");
      const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
      fill(made, message);
      if (follows) scrollDown();
      drawn = performance.now();
    }
  }
  fill(made, message);
}

function stats(usage, begin, first) {
  const seconds = (performance.now() - first) / 1000;
  const rate = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : 0;
  const cached = usage.prompt_tokens_details?.cached_tokens;
  return [
    `${usage.completion_tokens} tokens`,
    rate ? `${rate.toFixed(rate < 10 ? 1 : 0)} tok/s` : "",
    `first after ${Math.round(first - begin)} ms`,
    cached ? `${cached} of ${usage.prompt_tokens} from the cache` : "",
  ].filter(Boolean).join(" · ");
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (is) $("status").textContent = "Answering …";
}

function send() {
  const content = $("input").value.trim();
  if (!content || running || !model) return;
  current.title ||= content.slice(0, 60);
  current.messages.push({ role: "user", content, images: attached });
  attached = [];
  $("input").value = "";
  grow();
  showAttached();
  keep();
  showMessages();
  answer();
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function showAttached() {
  $("attached").replaceChildren(
    ...attached.map((src) => element("li", {}, element("img", { src, alt: "Attached image" }))));
}

async function attach(files) {
  for (const file of files) {
    const reader = new FileReader();
    reader.readAsDataURL(file);
    await new Promise((done) => { reader.onload = done; });
    attached.push(reader.result);
  }
  showAttached();
}

function exportAll() {
  const data = encodeURIComponent(JSON.stringify(conversations, null, 2));
  element("a", { href: `data:application/json,${data}`, download: "conversations.json" }).click();
}

function toggle(button, panel, change) {
  $(button).addEventListener("click", () => {
    const shown = change($(panel));
    $(button).setAttribute("aria-expanded", String(shown));
  });
}

export function start(served) {
  model = served;
  const sees = (served.input_modalities ?? []).includes("image");
  $("attach").hidden = !sees;
  listConversations();
  showMessages();
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", () => show(fresh()));
  $("export").addEventListener("click", exportAll);
  $("input").addEventListener("input", grow);
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("files").addEventListener("change", () => attach($("files").files));
  $("input").addEventListener("paste", (event) => {
    const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (sees && images.length) { event.preventDefault(); attach(images); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    const typing = ["INPUT", "TEXTAREA"].includes(document.activeElement.tagName);
    if (event.key === "/" && !typing && !$("chat").hidden) { event.preventDefault(); $("input").focus(); }
  });
  toggle("show-settings", "settings", (panel) => { panel.hidden = !panel.hidden; return !panel.hidden; });
  toggle("show-history", "history", (panel) => panel.classList.toggle("shown"));
}
