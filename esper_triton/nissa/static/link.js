// The way to the server: requests, and the WebSocket that is made again when it is lost.

const LONGEST_MS = 5000;
const NO_TOKEN = 4401;
let watcher = () => null;

/** `given` returns the token, for servers that let nobody look without. */
export function identify(given) {
  watcher = given;
}

/** {ok, status, body}; `body.error` says why not. */
export async function ask(path, options = {}, token = watcher()) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  try {
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    return { ok: response.ok, status: response.status, body: await response.json() };
  } catch (error) {
    return { ok: false, status: 0, body: { error: `the server does not answer (${error.message})` } };
  }
}

export class Link {
  /** `take(message)` for each message; `tell(state)` with "live", "away" or "locked". */
  constructor(take, tell) {
    this.take = take;
    this.tell = tell;
    this.pause = 250;
    this.connect();
  }

  connect() {
    clearTimeout(this.timer);
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
    this.socket = socket;
    socket.onopen = () => {
      const token = watcher();
      if (token) socket.send(JSON.stringify({ token }));
    };
    socket.onmessage = (event) => {
      this.pause = 250;
      this.tell("live");
      this.take(JSON.parse(event.data));
    };
    socket.onclose = (event) => {
      if (this.socket !== socket) return;
      this.tell(event.code === NO_TOKEN ? "locked" : "away");
      if (event.code === NO_TOKEN) return;
      this.timer = setTimeout(() => this.connect(), this.pause);
      this.pause = Math.min(2 * this.pause, LONGEST_MS);
    };
  }

  /** With another token. */
  again() {
    const old = this.socket;
    this.connect();
    old.close();
  }
}
