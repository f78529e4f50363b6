// Calls of the server's endpoints.

const SECOND = 1000, REPLY_TIMEOUT = 30 * SECOND;
const NO_REPLY = "The server did not answer: see whether it still runs, and try again.";
const root = (window.gradio_config?.root || location.href.split(/[?#]/)[0]).replace(/\/$/, "");
const send = window.fetch.bind(window);

// The visitor's token cannot be guessed, and stays in this browser.
const letters = String.fromCharCode(...crypto.getRandomValues(new Uint8Array(24)));
const visitor = remembered.get("latentsync-visitor") || btoa(letters).replace(/\+/g, "-").replace(/\//g, "_");
remembered.set("latentsync-visitor", visitor);

// Where Gradio finds no server for a request, it ignores whatever follows, and loads the page again once there is a
// server: settings would be lost. So its requests wait here until a server answers. That of a job is not sent a second
// time, as the first may have arrived.
window.fetch = async (input, init) => {
  if (!String(input?.url ?? input).includes("/gradio_api/run/")) return send(input, init);
  for (;;) {
    try {
      return await send(input, init);
    } catch (error) {
      if (init?.signal?.aborted) throw error;
      if (String(init?.body).includes(visitor)) return Response.json({ data: [{ error: NO_REPLY }] });
      await new Promise((resolve) => setTimeout(resolve, SECOND));
    }
  }
};

async function call(name, ...data) {
  const response = await send(`${root}/gradio_api/run/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ data }),
    signal: AbortSignal.timeout(REPLY_TIMEOUT), // a server that went away meanwhile may never answer
  });
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return (await response.json()).data[0];
}

const WITHOUT_VISITOR = ["fetch", "stop_fetching", "remove_model"]; // models are everybody's

document.addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-call]");
  if (!button || (button.dataset.question && !confirm(button.dataset.question))) return;
  const [name, ...data] = JSON.parse(button.dataset.call);
  button.disabled = true;
  try {
    onReply(await call(name, ...data, ...(WITHOUT_VISITOR.includes(name) ? [] : [visitor])));
  } catch {
    notice(NO_REPLY);
  }
  button.disabled = false;
});

/** Show what an endpoint replied to something that the visitor did. */
function onReply(reply) {
  if (!reply) return;
  if (reply.error) {
    notice(reply.error);
    find("#notice").scrollIntoView({ behavior: "smooth", block: "nearest" });
  } else if (reply.job || reply.checked || reply.fetching || reply.removed != null) {
    notice("");
  }
  const player = find("#video video");
  if (reply.picture && player) player.poster = reply.picture; // a browser knows few formats, and shows nothing of others
  if (reply.job || reply.fetching || reply.removed != null) {
    refresh().then(refresh).then(() => { // the first may have been under way before
      if (reply.job && innerWidth < 900) find("#jobs").scrollIntoView({ behavior: "smooth" });
    });
  }
}
