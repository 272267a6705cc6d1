// Who commands, and whether they mean it.
import { find } from "./dom.js";
import { ask } from "./link.js";

const KEY = "esper-operator-token";

export const token = () => sessionStorage.getItem(KEY);

/** Sends a command; without a right to, asks for the token. */
export async function send(command) {
  const answer = await ask("/api/commands", { method: "POST", body: JSON.stringify(command) }, token());
  if (answer.status === 401) openToken();
  return answer;
}

/** Whether somebody has confirmed it. */
export function confirmed(heading, text, label) {
  const dialog = find("confirm");
  find("confirm-title").textContent = heading;
  find("confirm-text").textContent = text;
  find("confirm-yes").textContent = label;
  return new Promise((resolve) => {
    let sure = false;
    find("confirm-yes").onclick = () => {
      sure = true;
      dialog.close();
    };
    find("confirm-no").onclick = () => dialog.close();
    dialog.addEventListener("close", () => resolve(sure), { once: true });
    dialog.showModal();
    find("confirm-no").focus();
  });
}

export function openToken() {
  find("token").value = token() ?? "";
  find("token-dialog").showModal();
}

/** `changed` is called when another token is kept, or none. */
export function prepare(changed) {
  const close = (value) => {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
    find("token-dialog").close();
    find("operator").setAttribute("aria-pressed", String(Boolean(value)));
    changed();
  };
  find("operator").setAttribute("aria-pressed", String(Boolean(token())));
  find("operator").addEventListener("click", openToken);
  find("token-keep").addEventListener("click", () => close(find("token").value.trim()));
  find("token-forget").addEventListener("click", () => close(""));
  find("token").addEventListener("keydown", (event) => event.key === "Enter" && close(find("token").value.trim()));
}
