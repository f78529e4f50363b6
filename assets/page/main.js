// Once a second, while somebody looks, the server is asked what has changed.

let refreshing = null, serverId = null; // of the server that answered last
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
  if (news.error) return notice(news.error);
  const restarted = serverId !== null && serverId !== news.server;
  serverId = news.server;
  if (restarted) {
    resetPage();
    return update();
  }
  updateCards(news.jobs);
  const busy = news.running + news.waiting;
  setText(find("#load"), busy ? `${news.running} running, ${news.waiting} waiting` : "No job is running");
  if (measured !== null && measured !== news.measured) trigger("submit", {}); // the line under the slider
  measured = news.measured;
  await updateModels(news.models, news.fetching);
  await drawLive(news.live).catch(() => { drawnPlot = null; }); // no fault of the server's; it is tried again
}

function updateCards(jobs) {
  const ids = jobs.map((job) => job.id);
  for (const [id, { card }] of cards) {
    if (!ids.includes(id)) {
      card.remove();
      cards.delete(id);
    }
  }
  for (const job of [...jobs].reverse().filter((job) => job.state)) { // without a state: nothing has changed
    if (!cards.has(job.id)) {
      cards.set(job.id, { card: makeCard(job) });
      find("#cards").prepend(cards.get(job.id).card);
    }
    updateCard(cards.get(job.id), job);
    cards.get(job.id).version = job.version;
  }
  setShown(find("#empty"), cards.size === 0);
}

function sayUnreachable({ message }) {
  const login = "The server wants a login again: reload the page";
  setText(find("#load"), message === "watch: 401" ? login : "The server does not answer; asking again …");
}
function refresh() {
  return (refreshing ||= update().catch(sayUnreachable).finally(() => { refreshing = null; }));
}

/** Mark the button of the level on which the slider stands; −1: it stands between two. */
function markStop(index) {
  document.querySelectorAll("#stops button").forEach((button, i) => button.setAttribute("aria-pressed", i === index));
}

window.lipsync = { visitor, onReply, markStop, refresh, dropFiles };
const refreshIfSeen = () => { if (!document.hidden) refresh(); };
setInterval(refreshIfSeen, SECOND);
document.addEventListener("visibilitychange", refreshIfSeen);
refresh();
