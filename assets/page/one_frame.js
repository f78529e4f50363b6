// The preview of one frame: at which time, and where it is seen (optim/serving/preview_endpoint.py).

/** Seconds at which the visitor's players stand; null: neither was moved. */
const playerTime = () => find("#audio audio")?.currentTime || find("#video video")?.currentTime || null;

/** What is seen until the frame is there. */
function beginPreview() {
  return String(html`<section id="one-frame" aria-label="Preview of one frame"><p class="quiet" role="status">Painting one
    frame …</p></section>`);
}
/** Bring a frame into view that has been painted. */
function showPreview() {
  find("#one-frame")?.scrollIntoView({ behavior: "smooth", block: "nearest" });
}
/** A frame of another video says nothing any more. */
function closePreview() {
  if (find("#one-frame")) setShown(find("#one-frame"), false);
}
document.addEventListener("click", ({ target }) => { if (target.closest("[data-close]")) closePreview(); });
