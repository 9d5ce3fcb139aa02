#!/bin/sh
# tensorboardX 2.6.5: SummaryWriter.flush() returns before the events that were added just before it
# are in the file. Its docstring says that all pending events have been written then. add_scalar puts
# an event into a queue that a thread empties; flush() flushes the file and does not wait for the
# queue. A program that is killed after flush() loses them. Seen: of 50 new writers that get eight
# scalars and one flush(), all have fewer than eight in their file when it returns, and all eight
# a while later.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboardX==2.6.5 numpy==2.4.6 protobuf==7.36.2 packaging==26.4
"$folder/venv/bin/python" - "$folder/log" <<'END'
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter

TAG = "a_scalar"


def written(folder):
    return b"".join(path.read_bytes() for path in folder.iterdir()).count(TAG.encode())


short, writers = 0, []
for number in range(50):
    folder = Path(sys.argv[1], str(number))
    writer = SummaryWriter(str(folder))
    for step in range(8):
        writer.add_scalar(TAG, 0.5, step)
    writer.flush()
    short += written(folder) < 8
    writers.append((folder, writer))
time.sleep(1)
complete = 0
for folder, writer in writers:
    writer.flush()
    complete += written(folder) == 8
print(f"of 50 files {short} lack scalars when flush() returns, a second later {50 - complete}")
sys.exit(0 if short > 0 and complete == 50 else 1)
END
