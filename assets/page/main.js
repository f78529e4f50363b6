// While somebody looks, the server is asked what has changed: every four seconds, or two where news are awaited.

let refreshing = null, inContact = true, serverId = null; // of the server that answered last
let measured = null; // jobs by which the server knows this machine's speed

/** Forget another server: this one has neither the files in the form nor the addresses of results. Settings stay. */
function resetPage() {
  for (const { card } of cards.values()) card.remove();
  cards.clear();
  resetCurves();
  modelsVersion = -1; // not null: the dropdown of models is filled again, too
  trigger("clear", {});
}

async function update() {
  const versions = Object.fromEntries([...cards].map(([id, view]) => [id, view.version]));
  const news = await call("watch", visitor, since, versions);
  if (news.error) throw new Error(news.error);
  const restarted = serverId !== null && serverId !== news.server;
  serverId = news.server;
  if (restarted) {
    resetPage();
    return update();
  }
  if (!inContact) notice("");
  inContact = true;
  // Gradio's names for its fields leave out the words that are seen on them.
  document.querySelectorAll("button.upload-container[aria-label]").forEach((field) => field.removeAttribute("aria-label"));
  updateCards(news.jobs);
  const busy = news.running + news.waiting;
  setText(find("#load"), busy ? `${news.running} running, ${news.waiting} waiting` : "No job is running");
  setText(find("#sharing"), news.sharing);
  if (measured !== null && measured !== news.measured) describe();
  measured = news.measured;
  await updateModels(news.models, news.fetching);
  await drawLive(news.live).catch(() => {}); // the library did not come; it is tried again
}

function updateCards(jobs) {
  for (const [id, { card }] of cards) {
    if (!jobs.some((job) => job.id === id)) {
      card.remove();
      cards.delete(id);
    }
  }
  for (const job of [...jobs].reverse().filter((job) => job.state)) { // without a state: nothing has changed
    if (!cards.has(job.id)) {
      cards.set(job.id, { card: makeCard(job) });
      find("#cards").prepend(cards.get(job.id).card);
    }
    const view = cards.get(job.id);
    updateCard(view, { ...view.job, ...job }); // what cannot change comes once
    view.version = job.version;
  }
  setShown(find("#empty"), cards.size === 0);
  markMovable();
  showOutside();
}

/** Say that the server does not answer, also on cards: they show what was heard last. */
function sayUnreachable({ message }) {
  const text = message === LOGIN ? LOGIN : "The server does not answer; asking again …";
  inContact = false;
  notice(text);
  setText(find("#load"), text);
  for (const { card } of cards.values()) {
    if (!["running", "waiting"].includes(card.dataset.state)) continue;
    setText(find(".state", card), "No contact");
    find(".state", card).classList.add("lost");
    setText(find(".doing", card), "This is the last known state.");
  }
}
function refresh() {
  return (refreshing ||= update().catch(sayUnreachable).finally(() => { refreshing = null; }));
}

/** Mark the button of the level on which the slider stands, and say what the slider means; −1: between two. */
function markStop(index, level, names) {
  document.querySelectorAll("#stops button").forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  const text = names[level.toFixed(1)] || `between ${names[level < 0.5 ? "0.0" : "0.5"]} and ${names[level < 0.5 ? "0.5" : "1.0"]}`;
  find("#level input[type=range]")?.setAttribute("aria-valuetext", `${level}: ${text}`);
}

// Gradio draws its parts one by one. The page stays hidden until all have been there, once: a field that holds a file has
// no input any more.
const PARTS = [
  "#video input", "#audio input", "#level input[type=range]", "#stop-2", "#examples .example", "#live #plot",
  "#doctor button", "#advanced button",
];
function showWhenComplete() {
  if (PARTS.every((part) => find(part))) document.documentElement.dataset.complete = "";
  else requestAnimationFrame(showWhenComplete);
}
showWhenComplete();

// What the visitor changes while the page loads stays, whatever the server then says to begin with.
const touched = new Set();
for (const kind of ["click", "input"]) {
  document.addEventListener(kind, ({ target }) => touched.add(target.closest("#stops") ? "level" : target.closest("#inputs .block[id]")?.id), true);
}
const settle = (names, begin, values) => values.map((value, i) => (touched.has(names[i]) ? value : begin[i] ?? value));

const describe = () => trigger("submit", {}); // the line under the slider
const checkFaces = () => trigger("edit", {}); // the note on the other faces
window.lipsync = {
  visitor, describe, checkFaces, settle, onReply, onStarted, markStop, markFace, markFaces, showPicture, refresh,
  dropFiles, playerTime, beginPreview, showPreview,
};
let turn = 0;
const refreshIfSeen = () => {
  // A hidden tab still shows progress in its title, but asks less often.
  const pause = document.hidden ? (hasUnfinished() ? 5 : Infinity) : changesSoon() ? 1 : 2;
  if ((turn += 1) % pause === 0) refresh();
};
setInterval(refreshIfSeen, 2 * SECOND); // each is 1.5 kB, most of it headers
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
