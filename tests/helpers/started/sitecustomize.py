"""Read at the start of processes of tests: PEFT finds no bitsandbytes, whose import takes 1.5 s."""

import sys

sys.modules["bitsandbytes"] = None
