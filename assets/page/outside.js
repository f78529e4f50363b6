// What can be seen of a job from outside the page: the tab's title, its icon, and a notification.

const TITLE = document.title, icon = find("link[rel=icon]"), ICON = icon?.href;
let unseen = ""; // how a job has ended that nobody has looked at

function showOutside() {
  const running = [...cards.values()].map(({ job }) => job).find((job) => job.state === "running");
  const part = running ? Math.floor((100 * running.mouths) / running.frames) : null;
  const text = running ? `${part} %` : unseen || (hasUnfinished() ? "Waiting" : "");
  setText(find("title"), text ? `${text} · ${TITLE}` : TITLE);
  if (icon && icon.dataset.text !== text) {
    icon.dataset.text = text;
    icon.href = text ? badge(running ? part : 100) : ICON;
  }
  for (const { card, job } of cards.values()) {
    setShown(find(".notify", card), isUnfinished(job) && window.Notification?.permission === "default");
  }
}

/** The icon with a ring that fills with the percentage. */
function badge(part) {
  const ring = `<circle cx="24" cy="24" r="6" pathLength="100" stroke-dasharray="${part} 100" stroke="#ffd166" stroke-width="4"
    transform="rotate(-90 24 24)"/>`;
  const dark = `<g fill="none"><circle cx="24" cy="24" r="7" fill="#06201d" stroke="#06201d" stroke-width="2"/>${ring}</g>`;
  return `data:image/svg+xml,${encodeURIComponent(decodeURIComponent(ICON.split(",")[1]).replace("</svg>", `${dark}</svg>`))}`;
}

function announceEnd(job) {
  if (!document.hidden) return;
  unseen = stateText(job);
  if (window.Notification?.permission === "granted") {
    new Notification(`${unseen}: ${job.names[0]} + ${voicesText(job)}`, { tag: job.id, icon: ICON });
  }
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) unseen = ""; });
document.addEventListener("click", ({ target }) => {
  if (target.closest(".notify")) Notification.requestPermission().then(showOutside);
});
