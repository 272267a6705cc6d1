"""A member of a group that is killed.

`python consumer.py ADDRESS JOURNAL GROUP LEDGER [SECONDS]` appends the `k` of each message to LEDGER, in one write, and
acknowledges it then. With SECONDS it takes one message at a time, says which, and works on it for so long.
"""

from __future__ import annotations

import os
import sys
import time

from esper_triton.oona import Oona


def main(address: str, journal: str, group: str, ledger: str, seconds: str | None = None) -> None:
    with Oona(address, journal=journal, lease_s=2.0) as bus, open(ledger, "ab", buffering=0) as out:
        subscription = bus.subscribe("*", group, window=1 if seconds else 64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for delivery in subscription:
            if seconds:
                sys.stdout.write(f"{delivery.envelope.payload['k']}\n")
                sys.stdout.flush()
                time.sleep(float(seconds))
            out.write(f"{delivery.envelope.payload['k']} {delivery.attempt} {os.getpid()}\n".encode())
            subscription.ack(delivery)


if __name__ == "__main__":
    main(*sys.argv[1:])
