// The page: what is shown of it, light or dark, and the key.

import { json, setKey } from "./api.js";
import * as card from "./card.js";
import * as chat from "./chat.js";
import * as plots from "./plots.js";

const THEME = "nibble.theme";
const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const one of tabs) {
    const is = one === tab;
    one.setAttribute("aria-selected", String(is));
    one.tabIndex = is ? 0 : -1;
    document.getElementById(one.getAttribute("aria-controls")).hidden = !is;
  }
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
});

const theme = document.getElementById("theme");
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function showTheme() {
  theme.textContent = isDark() ? "☀" : "☾";
}
if (localStorage.getItem(THEME)) document.documentElement.dataset.theme = localStorage.getItem(THEME);
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem(THEME, document.documentElement.dataset.theme);
  showTheme();
});
showTheme();

async function served() {
  for (;;) {
    try {
      return (await json("/v1/models")).data[0];
    } catch (error) {
      if (error.status === 401) await askForKey();
      else {
        document.getElementById("status").textContent = error.message;
        await new Promise((done) => setTimeout(done, 2000));
      }
    }
  }
}

function askForKey() {
  const dialog = document.getElementById("key-dialog");
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => {
      setKey(document.getElementById("key").value);
      document.getElementById("key").value = "";
      done();
    }, { once: true });
  });
}

const model = await served();
document.getElementById("model").textContent = `${model.id} · ${model.quantization} · ${model.max_model_len} tokens`;
document.getElementById("status").textContent = "";
chat.start(model);
plots.start();
card.start(model);
