// What this page knows: brought up to date by the server's messages, as nissa/live.py makes them.

const COLUMNS = ["state", "alpha", "health", "latency_us", "errors"];
const MOST_ENTRIES = 2000;
const MOST_JOBS = 200;

export class Seen {
  constructor() {
    this.forget();
  }

  /** A connection that is new begins from nothing. */
  forget() {
    this.states = [];
    this.models = new Map();
    this.jobs = new Map();
    this.entries = [];
    this.bus = { up: false, groups: {} };
  }

  /** Takes a message in; tells what it has touched: per model the places of seeds, or "all". */
  take(message) {
    if (message.states) {
      this.forget();
      this.states = message.states;
    }
    const touched = new Map();
    for (const one of message.models) {
      const model = this.models.get(one.name) ?? { name: one.name, count: 0 };
      this.models.set(one.name, model);
      for (const name of ["epoch", "cache", "damaged", "seen_at", "means"]) model[name] = one[name];
      if (one.seeds) {
        Object.assign(model, one.seeds, { count: one.seeds.state.length });
        touched.set(one.name, "all");
      } else if (one.patch) {
        for (const name of COLUMNS) one.patch.at.forEach((place, k) => (model[name][place] = one.patch[name][k]));
        touched.set(one.name, one.patch.at);
      }
    }
    for (const job of message.jobs) this.jobs.set(job.id, job);
    while (this.jobs.size > MOST_JOBS) this.jobs.delete(this.jobs.keys().next().value);
    this.entries.push(...message.entries);
    if (this.entries.length > MOST_ENTRIES) this.entries.splice(0, this.entries.length - MOST_ENTRIES);
    this.bus = message.bus;
    return touched;
  }
}
