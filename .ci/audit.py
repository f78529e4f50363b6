"""Say what pip-audit found, and what it could not look up: python audit.py REPORT.json LOG

Exits with 1 where a package has a known vulnerability.
"""

import json
import sys
from pathlib import Path


def summarize(report: str, log: str) -> tuple[str, int]:
    """Text to print, and the exit code; report: pip-audit's JSON, empty where it ended before it wrote one."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = log.strip().splitlines() or ["it gave no reason"]
        return f"NOT AUDITED: pip-audit failed, so nothing is known of the pinned packages ({lines[-1]}).", 0
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    vulnerable = [package for package in packages if package.get("vulns")]
    audited = len(packages) - len(skipped)
    text = f"Known vulnerabilities: {len(vulnerable)} of {audited} audited packages have one."
    if skipped:
        text += f"\nNOT AUDITED: {len(skipped)} of {len(packages)} pinned packages ({', '.join(sorted(skipped))})."
    for package in vulnerable:
        names = ", ".join(found["id"] for found in package["vulns"])
        text += f"\n{package['name']} {package['version']}: {names}"
    return text, 1 if vulnerable else 0


if __name__ == "__main__":
    report, log = (Path(path) for path in sys.argv[1:])
    text, code = summarize(report.read_text() if report.exists() else "", log.read_text())
    print(text)
    sys.exit(code)
