"""Writes docs/errors.md from the exception tree: `python docs/errors_page.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from rolloutd.errors import ERROR_BY_CODE, RolloutdError

REMEDIES = {
    "CONFIG_INVALID": (
        "The message names the option, its value and what is allowed. `rolloutd serve --help` lists all options."
    ),
    "MODEL_NOT_FOUND": (
        "Pass a directory that holds `config.json` and safetensors files, or a hub id. Offline, the hub id must "
        "already lie in the local cache."
    ),
    "MODEL_UNSUPPORTED": (
        "The message names the architecture, or the option in its config, that has no implementation, and why. "
        "[models.md](models.md) lists what is native, what runs by transformers' own code, and what is refused; with "
        "`--model-impl auto` the first two are served."
    ),
    "LORA_UNSUPPORTED": (
        "The message names the option of the adapter (DoRA, `modules_to_save`, trained biases, …). Leave it out, or "
        "merge the adapter into the model and push full weights."
    ),
    "ADDRESS_IN_USE": (
        "Another daemon serves there. Use its connection file, stop it, or give this one another `--listen`."
    ),
    "NO_LISTENER": (
        "Start the daemon, or correct the address. A connection file left behind by a daemon that was killed names "
        "a socket that nobody holds."
    ),
    "INVALID_REQUEST": "Only this request failed. The message names the field and the remedy.",
    "TOKEN_OUT_OF_RANGE": (
        "A prompt holds an id that the model's vocabulary lacks: most often the tokenizer of another model."
    ),
    "MAX_MODEL_LEN": "Shorten the prompt, lower `max_tokens`, or start the daemon with a larger `--max-model-len`.",
    "ID_REUSE": "A request id names one request for ever. Leave ids to the client, or make new ones.",
    "MESSAGE_TOO_LARGE": "Send fewer prompts at once, or raise `--max-message-bytes`.",
    "REQUEST_EXCEEDS_KV_POOL": (
        "One sequence of this length does not fit into the whole KV cache. Lower `max_tokens`, or raise "
        "`--kv-cache-bytes` or `--gpu-memory-utilization`."
    ),
    "TOO_MANY_CLIENTS": "Close clients that are no longer used, or raise `--max-clients`.",
    "QUEUE_FULL": "Wait for answers before sending more, or raise `--max-queued-requests`.",
    "DEADLINE_EXCEEDED": (
        "The caller's own timeout passed; the request was cancelled. Raise the timeout or ask for less."
    ),
    "ENGINE_STALLED": (
        "One step took longer than `--stall-s`. The daemon's log holds what it was doing; on a machine that swaps "
        "or shares its cores, raise `--stall-s`."
    ),
    "ENGINE_DIED": (
        "The engine process ended: out of memory, a signal, or a defect. The daemon's log holds its last lines."
    ),
    "ENGINE_LOADING": (
        "The model is still being read. Wait and try again; clients do so by themselves until their timeout."
    ),
    "DAEMON_UNREACHABLE": "The daemon was there and stopped answering. See whether it still runs, then its log.",
    "OUT_OF_MEMORY": (
        "A step that meets this is scheduled again in smaller pieces, and the daemon goes on; this error comes where "
        "even one token has no memory, where new weights do not fit beside those that serve (these serve on), where "
        "`wake_up` finds the memory taken (call it again once it is free), or where a model does not fit at the start. "
        "Lower `--gpu-memory-utilization`, `--max-num-batched-tokens` or `--max-num-seqs`, or use `sleep` while the "
        "trainer needs the memory."
    ),
    "SHUTTING_DOWN": "The daemon got a signal to stop and takes no new work. Start it again, or connect to another.",
    "PEER_FAILED": (
        "The message ends with what the process printed last; most often a package is missing or memory was too small. "
        "Leave the peer out of `--peers`, or mend it in its own environment."
    ),
    "MANIFEST_MISMATCH": (
        "The update's tensors are not those of the model that is served: another checkpoint, a resized vocabulary, "
        "or a wrapper that renames parameters. The message names the first difference. The old weights serve on."
    ),
    "DIGEST_MISMATCH": (
        "Bytes changed on their way, most often because the trainer wrote to a tensor while it was being sent. Push "
        "again after the optimizer step is over. The old weights serve on."
    ),
    "STALE_WEIGHTS": (
        "The daemon was started again, or another policy was pushed to it, and serves older weights than this request "
        "may be computed with. Push the weights first: `update_weights` or `update_lora`."
    ),
    "TRANSPORT_FAILED": (
        '`transport="collective"` or `"nccl"` opens a connection of its own from the daemon to the trainer. Check that '
        "`collective_address` is an address of the trainer's host that the daemon reaches, and that no firewall stands "
        "between them; or leave the transport to `auto`. The old weights serve on."
    ),
    "PARITY_MISMATCH": (
        "Every byte arrived, and still the daemon computes something else than the trainer: another model, other "
        "rounding (`--numerics`), an adapter with another scaling, or tokens from another tokenizer. The new weights "
        "serve. `rolloutd check --model …` measures both sides on the checkpoint; a gap that only training opens is in "
        "what was pushed."
    ),
    "WEIGHTS_LOST": (
        "With `--weight-staging none` updates are written over what serves, and one was cut or refused half-way. "
        "Rather than serve a mix, the daemon serves nothing until a full update succeeds: push again with "
        "`update_weights`."
    ),
    "UPDATE_CONFLICT": (
        "One update runs at a time. Wait for the other one, or see which second trainer is connected. A base that a "
        "trainer shares (`adopt`) takes no full update until `release`."
    ),
    "MALFORMED": "The peer does not speak this protocol, or is defective. Use the client of the same package.",
    "PROTOCOL_MISMATCH": "Client and daemon come from different versions of rolloutd. Install the same on both sides.",
    "AUTH_REQUIRED": (
        "The daemon listens beyond this host and wants keys. Pass its connection file instead of an endpoint."
    ),
    "INSECURE_BIND": (
        "A listener that other hosts reach needs `--allow-remote`, and clients its keys. For one host, leave "
        "`--listen ipc`."
    ),
    "INTERNAL": "A defect of rolloutd. Please report it, with the daemon's log.",
}
"""Code -> what a user does about it."""

HEAD = """# Errors

```
>>> SamplingParams(top_p=0.0)
Traceback (most recent call last):
  ...
RequestError: INVALID_REQUEST: top_p=0.0 keeps no token. Use temperature=0 for greedy, or a value in (0, 1].
```

Every error of rolloutd is a `rolloutd.RolloutdError` with a `code`, a message that names values and remedies, and
`retryable`, which says whether the same call may succeed later. Over the wire an error stays the same class. This page
is generated from `rolloutd/errors.py` by `docs/errors_page.py`.

| code | class | try again | what it means |
|---|---|---|---|
"""


def page() -> str:
    """Return the text of docs/errors.md."""
    rows, sections = [], []
    for code, cls in ERROR_BY_CODE.items():
        meaning = (cls.__doc__ or "").strip()
        rows.append(f"| `{code}` | `{cls.__name__}` | {'yes' if cls.retryable else 'no'} | {meaning} |")
        sections.append(f"## {code}\n\n{meaning} Raised as `{cls.__name__}`, {_ancestors(cls)}.\n\n{REMEDIES[code]}\n")
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(sections)


def _ancestors(cls: type[RolloutdError]) -> str:
    names = [f"`{base.__name__}`" for base in cls.__mro__[1:] if issubclass(base, RolloutdError)]
    return "a " + " and a ".join(names)


if __name__ == "__main__":
    (Path(__file__).parent / "errors.md").write_text(page(), encoding="utf-8")
