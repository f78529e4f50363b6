// Small things that the other scripts use. The scripts are one function, run with `element`, the block with the jobs,
// and `trigger`, which tells the server of an event (app.py, `SCRIPTS` and `Page._wire`).

const find = (selector, within = document) => within.querySelector(selector);
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const setShown = (node, shown) => { if (node.hidden === shown) node.hidden = !shown; };
const isDark = () => [document.body, document.documentElement].some((node) => node.classList.contains("dark"));
const sizeText = (bytes) => (bytes >= 1e8 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);
const fileName = (path) => path.split("/").pop();
const notice = (text) => setText(find("#notice"), text || "");

function clockText(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Markup of a template. Values are escaped, unless they are markup themselves; lists are joined, null is left out. */
class Markup extends String {}
const html = (parts, ...values) => new Markup(String.raw({ raw: parts }, ...values.map(asMarkup)));
function asMarkup(value) {
  if (Array.isArray(value)) return value.map(asMarkup).join("");
  if (value instanceof Markup || value == null) return value ?? "";
  return String(value).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
}
/** Text of the program, in which what is to be typed stands between backticks. */
const withCode = (text) => html`${text.split("`").map((part, i) => (i % 2 ? html`<code>${part}</code>` : part))}`;
function asElement(markup) {
  const template = document.createElement("template");
  template.innerHTML = String(markup).trim();
  return template.content.firstElementChild;
}

/** A button that calls an endpoint, see server.js; question: to be answered first. */
const callButton = (label, call, kind = "soft", question = "") => html`<button type="button" class="${kind}"
  data-call="${JSON.stringify(call)}" data-question="${question}">${label}</button>`;

/** What this browser remembers; one that stores nothing forgets it when the tab is closed. */
const remembered = {
  get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* as said */ } },
};
