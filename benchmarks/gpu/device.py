"""Name, driver and limits of the GPU by nvidia-smi: no torch, no CUDA context, for the parent."""

import platform
import subprocess


def smi(**fields: str) -> dict[str, str]:
    """nvidia-smi's fields of the first GPU, by names of ours.

    Where it fails or is absent its error is the one field: it must not end the parent.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, "-i", "0"], capture_output=True, text=True)
    except OSError as error:
        return {"smi": str(error)}
    if done.returncode:
        return {"smi": (done.stdout + done.stderr).strip()}
    return dict(zip(fields, map(str.strip, done.stdout.split(",")), strict=True))


def device(rehearse: bool) -> dict[str, str]:
    """The line at the start of every call: later lines of the results are of this device."""
    if rehearse:
        return {"name": platform.processor() or platform.machine()}
    fields = {
        "driver": "driver_version",
        "power_limit": "power.limit",
        "max_clock": "clocks.max.sm",
    }
    return {"name": "unknown"} | smi(name="name", **fields)
