// A card for each of the visitor's jobs, and how far it is.

const cards = new Map(); // by job: {card, job, version, …}
const STAGES = { faces: "Faces", mouths: "Mouths", writing: "Written" };
const STATES = { waiting: "Waiting", running: "Working", done: "Done", cancelled: "Cancelled", failed: "Failed" };
const stateText = (job) => (job.state === "cancelled" && job.files.result ? "Part kept" : STATES[job.state]);
const isUnfinished = (job) => job.state === "running" || job.state === "waiting";
const hasUnfinished = () => [...cards.values()].some(({ job }) => isUnfinished(job));
/** Whether a visitor waits for what comes next: a job's beginning, its first minute, or its end. */
const changesSoon = () => [...cards.values()].some(({ job }) => (job.state === "running"
  ? job.elapsed < 60 || (job.seconds_left ?? 60) < 20 : job.state === "waiting" && !job.before));
const PAUSES = [15, 120]; // seconds from one picture of a job to the next: three times as many each time, within these

/** The names of what is said, by each face. */
const voicesText = ({ names, others }) => [names[1], ...others.map(({ name }) => name)].join(" + ");

function makeCard(job) {
  return asElement(html`
    <article class="card" data-job="${job.id}" aria-label="Job ${job.names[0]}" style="--ratio: ${job.size.join("/")}">
      <div class="row"><h2>${job.names[0]} + ${voicesText(job)}</h2><span class="state" role="status"></span></div>
      <p class="made-with quiet">${levelText(job)} · ${dateText(job.created)}</p>
      <p class="doing"></p>
      <div class="busy">
        ${Object.entries(STAGES).map(([stage, label]) => html`<div class="stage" data-stage="${stage}">
          <span>${label}</span>
          <progress max="${job.frames}" value="0" aria-label="${label}"></progress><output></output>
        </div>`)}
        <p class="rate"></p>
        <div class="buttons">
          ${callButton("Cancel", ["cancel", job.id, false], "cancel")}
          ${callButton("Stop and keep what is finished", ["cancel", job.id, true], "keep soft")}
          ${callButton("Earlier", ["move", job.id, true], "earlier")}
          ${callButton("Remove", ["remove", job.id], "drop")}
          <button type="button" class="notify" hidden>Notify me when it is done</button>
        </div>
        <div class="pair">
          <figure class="newest" hidden>
            <button type="button" title="Show the newest finished frame"><img alt="A finished frame"></button>
            <figcaption>Finished frame; click for the newest</figcaption>
          </figure>
          <figure class="first" hidden>
            <video controls playsinline preload="none" aria-label="The first seconds of the result"></video>
            <figcaption></figcaption>
          </figure>
        </div>
      </div>
      <p class="error failure" role="alert" hidden></p>
      <div class="buttons remedies" hidden></div>
      <div class="result" hidden></div>
    </article>`);
}

/** The level of a job: a stop's name, or the place of the slider. */
function levelText({ report, settings }) {
  const level = report?.level ?? settings.level, place = Number(level);
  return Number.isNaN(place) ? level : LEVELS[2 * place] ?? `level ${place}`;
}
const DATE = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const dateText = (seconds) => DATE.format(new Date(seconds * 1000));

function doingText(job) {
  const before = job.before ?? 0;
  if (job.state === "waiting" && !before) return "It is the next one";
  if (job.state === "waiting") return before === 1 ? "1 job comes before this one" : `${before} jobs come before this one`;
  if (job.state === "running") return `${job.doing} · ${clockText(job.elapsed)} so far`;
  if (job.state === "done") return `done in ${clockText(job.elapsed)}${job.faces_known ? ", with the faces found before" : ""}`;
  return job.elapsed === null || job.files.result ? job.doing : `${job.doing} after ${clockText(job.elapsed)}`;
}

function updateCard(view, job) {
  const { card } = view, busy = isUnfinished(job);
  if (busy !== isUnfinished(view.job ?? job) && !busy) announceEnd(job);
  view.job = job;
  setText(find(".state", card), stateText(job));
  find(".state", card).classList.remove("lost");
  setText(find(".made-with", card), `${levelText(job)} · ${dateText(job.created)}`);
  setText(find(".doing", card), doingText(job));
  setShown(find(".busy", card), busy);
  if (busy) updateProgress(view, job);
  if (card.dataset.state !== job.state) {
    card.dataset.state = job.state;
    card.style.order = "";
    if (!busy) showEnd(view, job);
  }
  if (job.files.result) updateComparison(view, job);
}

function updateProgress(view, job) {
  const { card } = view, part = (selector) => find(selector, card);
  for (const stage of Object.keys(STAGES)) {
    const known = stage === "faces" && job.faces_known, done = stage === "mouths" ? job.mouths : job.stages[stage];
    part(`[data-stage=${stage}] progress`).value = known ? job.frames : done;
    setText(part(`[data-stage=${stage}] output`), known ? "found before" : `${Math.floor(done)} / ${job.frames}`);
  }
  const speed = job.frames_per_second;
  const speedText = speed ? `${speed.toFixed(speed < 10 ? 2 : 0)} frames/s · ` : "";
  const left = job.seconds_left == null ? null : `${speedText}about ${clockText(job.seconds_left)} left`;
  setText(part(".rate"), left ?? "Time left: known once the first frames are painted");
  if (job.picture && !document.hidden && !(job.elapsed < view.pictureAt + view.pause)) showPictureOf(view);
  const player = part(".first video"), untouched = (player.paused || player.ended) && !player.currentTime;
  if (job.files.first && job.playable > 0 && view.playable !== job.playable && untouched) {
    view.playable = job.playable;
    setShown(part(".first"), true);
    player.poster = part("img").src;
    player.src = `${root}/lipsync/${job.files.first}?${job.playable}`;
    setText(part(".first figcaption"), `The first ${job.playable} s of the result, with sound`);
  }
  part("button.cancel").disabled = job.ending;
  part("button.keep").disabled = job.ending || job.stages.writing === 0;
}

/** Show the newest finished frame. It is as large as twenty polls, so the longer a job runs the fewer come unasked. */
function showPictureOf(view) {
  const { card, job } = view;
  view.pause = Math.min(3 * (view.pause ?? PAUSES[0] / 3), PAUSES[1]);
  view.pictureAt = job.elapsed;
  find("img", card).src = `${root}/lipsync/${job.picture}`;
  setShown(find(".newest", card), true);
  find(".newest button", card).onclick = () => { // who looks gets more for a while
    view.pause = undefined;
    view.pictureAt = -PAUSES[1];
    refresh();
  };
}

/** Show how a job has ended: its result, or its error and what can be done. */
function showEnd(view, job) {
  const { card } = view, remedy = job.remedy ?? {}, buttons = [];
  find(".first video", card).removeAttribute("src");
  setShown(find(".failure", card), Boolean(job.error));
  setText(find(".failure", card), job.error || "");
  if (remedy.settings) buttons.push(callButton(remedy.label, ["again", job.id, remedy.settings], "main"));
  if (remedy.focus) buttons.push(html`<button type="button" class="main another">${remedy.label}</button>`);
  if (!job.files.result) {
    buttons.push(callButton("Run again", ["again", job.id, {}]), callButton("Remove", ["remove", job.id]));
  }
  const box = find(".remedies", card);
  box.innerHTML = html`${buttons}`;
  setShown(box, buttons.length > 0);
  find(".another", box)?.addEventListener("click", chooseAnother);
  if (job.files.result) showResult(view, job);
}

/** Offer to move a waiting job where another of this visitor waits before it. */
function markMovable() {
  const waiting = [...cards.values()].filter(({ job }) => job.state === "waiting");
  const first = Math.min(...waiting.map(({ job }) => job.before));
  for (const { card, job } of waiting) {
    setShown(find(".earlier", card), job.before > first);
    card.style.order = String(job.before - 1000); // as they will run, above what has ended
  }
}
