// The result of a job in its card: beside the original, with what it was made with and how long that took.

const row = ([name, value]) => html`<tr><th scope="row">${name}</th><td>${value}</td></tr>`;
const table = (caption, rows) => html`<table><caption>${caption}</caption>${Object.entries(rows).map(row)}</table>`;
const LEVELS = ["conservative", "balanced", "aggressive"]; // optim/levels.py
const inSeconds = (seconds) => `${seconds.toFixed(2)} s`;

function settingsUsed(job) {
  const { settings, level, model, resolution, device, frames, frames_without_face: faceless } = job.report;
  const { fps, painted_fps: painted } = job.report;
  const said = [job.names[1], ...job.others.map(({ name }) => name)];
  const faces = [settings.face, ...(settings.other_faces ?? [])].map((face, i) => `${face}: ${said[i]}`);
  return {
    level,
    model: `${model}, ${resolution} px, on ${device}`,
    steps: settings.steps,
    "lip strength": settings.guidance_scale,
    seed: settings.seed,
    DeepCache: settings.cache ? `every ${settings.cache.interval} steps` : "off",
    ...(job.others.length ? { "faces and voices": faces.join(", ") } : { face: settings.face }),
    ...(job.sound && { "sound of the result": job.sound }),
    "silence gate": settings.silence_gate ? "on" : "off",
    ...(painted < fps && { painted: `${painted} of ${fps} frames a second` }),
    "match colours": settings.match_colours === null ? "as the model has it" : settings.match_colours ? "on" : "off",
    "faces restored": settings.restore ? `by ${settings.restore_strength}` : "no",
    "output quality": `CRF ${settings.crf}`,
    frames: faceless ? `${frames}, ${faceless} without a usable face` : frames,
  };
}

function adviceItem({ severity, problem, remedy }) {
  const heading = severity[0].toUpperCase() + severity.slice(1);
  return html`<li class="${severity}"><b>${heading}</b> ${problem} <span>${remedy}</span></li>`;
}

function showResult(view, job) {
  const box = find(".result", view.card), name = fileName(job.files.result);
  const url = (file) => `${root}/lipsync/${job.files[file]}`;
  const seconds = Object.entries(job.report.seconds).map(([stage, time]) => [stage, inSeconds(time)]);
  const question = `Delete ${name} and all other files of this job?`;
  box.innerHTML = html`
    <div class="pair">
      <figure class="other">
        <video class="original" muted playsinline preload="metadata" src="${url("original")}"
          poster="${root}/lipsync/${job.files.result.split("/")[0]}/first-frame" aria-label="Original, without sound"></video>
        <figcaption></figcaption>
      </figure>
      <figure class="own">
        <video class="made" controls playsinline preload="metadata" src="${url("result")}"
          aria-label="Result"></video>
        <figcaption>Result</figcaption>
      </figure>
    </div>
    <label class="wipe-at" hidden>Divider<input type="range" min="0" max="100" value="50"></label>
    <div class="buttons">
      <a class="button main" href="${url("result")}" download="${name}">Download</a>
      <label class="choice">Compare with<select class="with"></select></label>
      <button type="button" class="soft wipe" aria-pressed="false" title="Lay one over the other, with a divider to move; again: side by side">One over the other</button>
      <span class="beside"></span>
      ${callButton("Remove", ["remove", job.id], "soft", question)}
    </div>
    <div class="buttons again"><span class="quiet">Run again:</span>
      ${LEVELS.filter((level) => level !== job.report.level).map((level) => callButton(level, ["again", job.id, { level }]))}
      <button type="button" class="soft rerun" title="With the settings that the page has now">with the page's settings</button>
      <button type="button" class="soft reuse" title="The page gets the settings of this job">Set the page to its settings</button>
    </div>
    <p class="error comparison" role="alert" hidden></p>
    <details>
      <summary>Settings, time and advice</summary>
      <div class="tables">
        ${table("Settings used", settingsUsed(job))}
        ${table("Seconds each stage was busy", {
          ...Object.fromEntries(seconds), "in all (stages overlap)": inSeconds(job.report.total_seconds),
        })}
      </div>
      <button type="button" class="soft timeline">Show the timeline</button>
      ${job.messages.map((message) => html`<p class="message">${withCode(message)}</p>`)}
      ${job.advice.length ? html`<ul class="advice">${job.advice.map(adviceItem)}</ul>` : null}
    </details>`;
  const original = find(".original", box), made = find(".made", box);
  follow(made, original);
  compareWith(view, job, box, original);
  find(".reuse", box).onclick = () => trigger("select", { settings: job.settings });
  find(".rerun", box).onclick = () => trigger("retry", { job: job.id, visitor });
  find(".timeline", box).onclick = () => trigger("expand", { job: job.id, visitor });
  view.comparison = null;
  setShown(box, true);
}

/** Let the visitor choose what is seen beside the result: the original, nothing, or another result; or below a seam. */
function compareWith(view, job, box, player) {
  const select = find(".with", box), wipe = find(".wipe", box), seam = find(".wipe-at", box), pair = find(".pair", box);
  const caption = find(".other figcaption", box), original = player.src;
  const results = () => [...cards.values()].map((each) => each.job).filter((each) => each.files.result && each.id !== job.id);
  const fill = () => {
    const options = [["original", "the original"], ["", "nothing"]];
    for (const other of results()) options.push([other.id, `${voicesText(other)}, ${levelText(other)}, ${dateText(other.created)}`]);
    const value = select.options.length ? select.value : "original";
    select.innerHTML = html`${options.map(([id, text]) => html`<option value="${id}">${text}</option>`)}`;
    select.value = options.some(([id]) => id === value) ? value : "original";
  };
  const show = () => {
    const other = results().find((each) => each.id === select.value), none = select.value === "";
    const shown = other ? `${root}/lipsync/${other.files.result}` : original;
    player.poster = `${root}/lipsync/${(other ?? job).files.result.split("/")[0]}/first-frame`;
    if (player.src !== shown) player.src = shown;
    setText(caption, other ? `${levelText(other)}, muted` : "Original, in sync, muted");
    setShown(find(".other", box), !none);
    const over = (known = true) => {
      const laid = known && !none && wipe.getAttribute("aria-pressed") === "true";
      setShown(wipe, known);
      pair.classList.toggle("over", laid);
      setShown(seam, laid);
    };
    over();
    if (!other) explainUnknown(player, caption, () => over(false));
  };
  player.muted = true; // the attribute has no effect in markup
  select.onfocus = select.onpointerdown = fill;
  select.onchange = show;
  wipe.onclick = () => { wipe.setAttribute("aria-pressed", String(wipe.getAttribute("aria-pressed") !== "true")); show(); };
  find("input", seam).oninput = ({ target }) => pair.style.setProperty("--seam", `${target.value}%`);
  fill();
  show();
}

/** A picture, or a video that this browser does not know, is shown by its first frame. */
function explainUnknown(player, caption, onUnknown) {
  const still = (text) => { player.removeAttribute("src"); player.load(); setText(caption, text); };
  if (/\.(png|jpe?g|webp|bmp|gif|avif)$/i.test(player.src)) return still("Original, a picture");
  const unknown = () => { still("First frame of the original: this browser cannot play its format"); onUnknown(); };
  player.onerror = () => player.getAttribute("src") && unknown();
  player.onloadedmetadata = () => player.videoWidth || unknown(); // it may know the sound alone
}

/** Let `follower` play along with `leader`. Where it is shorter, it is shown forward and backward. */
function follow(leader, follower) {
  const turn = () => leader.currentTime % (2 * follower.duration);
  const backward = () => follower.duration && turn() > follower.duration;
  const align = () => {
    if (!follower.duration) return;
    const place = backward() ? 2 * follower.duration - turn() : turn();
    if (Math.abs(follower.currentTime - place) > 0.12) follower.currentTime = place;
  };
  const stop = () => { follower.pause(); align(); };
  const start = () => { align(); follower.play().catch(() => {}); };
  leader.addEventListener("play", () => (backward() ? align() : start()));
  leader.addEventListener("pause", stop);
  leader.addEventListener("seeking", align);
  leader.addEventListener("ratechange", () => { follower.playbackRate = leader.playbackRate; });
  leader.addEventListener("timeupdate", () => {
    if (backward()) stop();
    else if (!leader.paused && follower.paused) start();
  });
}

/** The button that makes a video of original and result side by side, how far that is, and the link to it. */
function updateComparison(view, job) {
  const { state = "none", done = 0, total = 0, error } = job.comparison ?? {}, key = `${state} ${done}`;
  if (view.comparison === key) return;
  view.comparison = key;
  const box = find(".beside", view.card), message = find(".comparison", view.card);
  const part = job.compared_seconds < job.frames / job.fps - 1;
  const length = part ? `, of the first ${Math.round(job.compared_seconds / 60)} minutes` : "";
  box.title = `A video of original and result next to each other, with the new sound${length}`;
  const progress = state === "waiting" ? "waits for another" : `${total ? Math.floor((100 * done) / total) : 0} %`;
  const label = `Stop making the side-by-side video: ${progress}`, stop = find(".making", box);
  if (state === "done") {
    const file = job.files.compared;
    box.innerHTML = html`<a class="button" href="${root}/lipsync/${file}" download="${fileName(file)}">Download side by side</a>`;
  } else if (state !== "running" && state !== "waiting") {
    box.innerHTML = callButton("Make a side-by-side video", ["compare", job.id]);
  } else if (stop) {
    setText(stop, label);
  } else {
    box.innerHTML = callButton(label, ["cancel", job.id, false], "soft making");
  }
  setShown(message, Boolean(error));
  setText(message, error || "");
}
