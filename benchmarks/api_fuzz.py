"""Whether any request that the OpenAPI schema allows, or nearly allows, brings the gateway to an error of its own.

The gateway, started as a user starts it, with accounts and a stub engine; and Schemathesis, which reads the gateway's
own schema and sends what fits it and what just doesn't, with the key of an administrator, to every operation. A status
over 499 is a failure. Counted is what was sent, by operation and status.

    python benchmarks/api_fuzz.py [--requests 10000] [--seed 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from modelworks.serve.access import SCOPES
from serve_overload import gateway


def measure(requests: int, seed: int) -> dict[str, Any]:
    """Rounds of all operations, each from another seed, until enough was sent."""
    statuses: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with gateway(folder, ["root"], 64, 0.05, 256, scopes=SCOPES) as (address, keys, _):
            while statuses.total() < requests:
                left = requests - statuses.total()
                for call in _round(folder, address, keys["root"], seed, min(max(left // 25, 10), 400)):
                    statuses[call["status"]] += 1
                    operations[call["operation"]] += 1
                    if call["status"] >= "500":
                        failures.append(f"{call['status']} {call['operation']}: {call['request']}")
                seed += 1
                print(f"{statuses.total():,} requests: {dict(sorted(statuses.items()))}", file=sys.stderr, flush=True)
    return {
        "requests": statuses.total(),
        "statuses": dict(sorted(statuses.items())),
        "operations": dict(operations.most_common()),
        "failures": failures,
    }


def _round(folder: Path, address: str, key: str, seed: int, examples: int) -> list[dict[str, str]]:
    """What one run of Schemathesis sent, and what came back."""
    report = folder / f"{seed}.ndjson"
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{address}/openapi.json",
        *("--header", f"Authorization: Bearer {key}"),
        *("--phases", "examples,coverage,fuzzing"),
        *("--checks", "not_a_server_error"),
        *("--max-examples", str(examples)),
        *("--seed", str(seed)),
        *("--report-ndjson-path", str(report)),
        *("--warnings", "off"),
        *("--generation-database", "none"),
        "--continue-on-failure",
        "--no-color",
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder
    )  # where it leaves its cache
    if not report.exists():
        raise SystemExit(f"Schemathesis has failed:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return [call for line in report.open(encoding="utf-8") for call in _calls(json.loads(line))]


def _calls(event: dict[str, Any]) -> list[dict[str, str]]:
    recorder = event.get("ScenarioFinished", {}).get("recorder", {})
    found = []
    for call in recorder.get("interactions", {}).values():
        answer = call.get("response")  # none if the connection broke, which is a failure, too
        status = str(answer["status_code"]) if answer else "no answer"
        found.append({"operation": recorder["label"], "status": status, "request": json.dumps(call["request"])[:1000]})
    return found


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.requests, options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for failure in found["failures"]:
        print(failure)
    print(
        f"{found['requests']:,} requests to {len(found['operations'])} operations: {found['statuses']}; "
        f"{len(found['failures'])} failures"
    )
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
