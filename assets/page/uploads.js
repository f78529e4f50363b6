// The fields of files, and the button that starts a job.

// Gradio's fields refuse files whose type the browser does not know, as IMG_2041.MOV and .mkv on some systems, pictures
// in the place of a video, and a video in the place of a voice. They get every file as one that fits, and the server says
// what it is.
const ACCEPTED = {
  video: "video/*,image/*,.mov,.mkv,.avi,.mts,.m2ts,.3gp,.heic,.avif",
  audio: "audio/*,video/*,.m4a,.mka,.opus,.caf,.amr,.mov,.mkv",
};
const fieldOf = (node) => node.closest("#video, #audio, #more-voices, .voice");
const kindOf = (field) => (field.id === "video" ? "video" : "audio");
const inputOf = (field) => find("input[type=file]", field);

function asKind(files, kind) {
  const transfer = new DataTransfer();
  for (const file of files) {
    const fits = file.type.startsWith(`${kind}/`);
    transfer.items.add(fits ? file : new File([file], file.name, { type: `${kind}/any` }));
  }
  return transfer.files;
}

document.addEventListener("click", ({ target }) => {
  const field = fieldOf(target), input = field && inputOf(field);
  if (input) input.accept = ACCEPTED[kindOf(field)]; // before its dialog opens
  if (target.closest(".example")) forgetNote();
}, true);
document.addEventListener("change", ({ target }) => {
  const field = target.type === "file" && fieldOf(target);
  if (!field) return;
  if (field.id === "video") field.classList.toggle("still", /^image\//.test(target.files[0]?.type));
  target.files = asKind(target.files, kindOf(field));
}, true);

// Files that are dropped on a field replace what it holds; anywhere else the browser would open them in place of the page.
const holdsFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => { if (holdsFiles(event)) event.preventDefault(); });
document.addEventListener("drop", async (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  event.stopPropagation();
  event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
  const field = fieldOf(event.target);
  if (!field) return startNote("Drop a video on the upper field, a voice on the lower one.");
  const files = asKind(event.dataTransfer.files, kindOf(field)); // the event forgets them
  if (!inputOf(field)) find("[aria-label='Clear']", field)?.click();
  for (let turn = 0; turn < 40 && !inputOf(field); turn += 1) await new Promise((resolve) => { setTimeout(resolve, 50); });
  const input = inputOf(field);
  if (!input) return startNote("Choose upload in this field first, then drop the file again.");
  input.files = input.multiple ? files : asKind([files[0]], kindOf(field));
  input.dispatchEvent(new Event("change", { bubbles: true }));
}, true);

// Gradio's error that a browser cannot play a video: the server may well read it, and says so if not.
new MutationObserver(() => {
  for (const toast of document.querySelectorAll(".toast-body")) {
    if (toast.textContent.includes("Video not playable")) toast.querySelector("[data-testid=toast-close]")?.click();
  }
}).observe(find(".toast-wrap"), { childList: true, subtree: true });

/** Show a look at a video: a browser knows few formats, and shows nothing of others. */
function showPicture(look) {
  const field = find("#video"), player = find("video", field);
  closePreview();
  field.classList.toggle("still", look?.duration === null);
  if (look?.picture && player) player.poster = look.picture;
}

/** Mark the thumbnail of a chosen face, in the field with this id. */
const chosenFaces = {};
function markFace(face, field = "video-note") {
  chosenFaces[field] = face;
  markFaces();
}
function markFaces() {
  for (const [field, face] of Object.entries(chosenFaces)) {
    const buttons = document.querySelectorAll(`#${field} [data-face]`);
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.face === face));
  }
}

/** Say that the files in the form went with the server before; returns none for each of them. */
function dropFiles(files) {
  const lost = "The server was started again and no longer has your files: add them again.";
  if (files.some(Boolean)) startNote(lost, true);
  return files.map(() => null);
}

// One click is one job, however fast the second one follows; during an upload it is remembered.
const PAUSE = 1000; // milliseconds
let starting = false, startedAt = -PAUSE, waitsForUpload = false;

function startNote(text, isWarning) {
  setText(find("#start-note"), text);
  find("#start-note").classList.toggle("warning", Boolean(isWarning && text));
}
/** A note about the files in the form holds no longer, once there is another one. */
function forgetNote() {
  if (!starting && !waitsForUpload) startNote("");
}
document.addEventListener("click", (event) => {
  if (!event.target.closest("#start")) return;
  const again = starting || performance.now() - startedAt < PAUSE;
  if (again || uploading) event.stopImmediatePropagation();
  if (again) return;
  waitsForUpload = uploading > 0;
  if (waitsForUpload) return startNote("The job starts as soon as your file is uploaded …");
  starting = true;
  startedAt = performance.now();
  startNote("Starting …");
}, true);
function afterUpload() {
  // Gradio's fields take the file over after the reply: a moment later.
  if (waitsForUpload && !uploading) setTimeout(() => { if (waitsForUpload) find("#start").click(); }, 500);
}
function onStarted(reply) {
  starting = false;
  const notes = [...document.querySelectorAll(":is(#video-note, #audio-note) .problem")];
  const note = notes.find(({ textContent }) => textContent === reply?.error);
  note?.scrollIntoView({ behavior: "smooth", block: "nearest" });
  startNote(note ? "Not started: see the note at the file." : reply?.error ?? "", true);
  if (reply && !reply.error) onReply(reply);
}
/** Make room for another video and go to its field. */
function chooseAnother() {
  find("#video [aria-label='Clear']")?.click();
  find("#video").scrollIntoView({ behavior: "smooth", block: "center" });
  setTimeout(() => find("#video button")?.focus(), 100); // Gradio draws the empty field
}
