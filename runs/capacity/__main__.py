"""Capacity and trainability of recurrent networks: tune, look at studies, read the published data set.

    python -m runs.capacity tune --task parens_counting --architecture ugrnn --layers 2 --max-params 20000 --trials 60
    python -m runs.capacity export --study FOLDER --to table.h5
    python -m runs.capacity best --data rnn_hp_dataset.tar.gz --task text8 --architecture lstm
    python -m runs.capacity pictures --data table.p --to FOLDER

The first line typed again, in another terminal or on another machine that shares the folder, is another worker of the
same study.
"""

from __future__ import annotations

import sys

from runs.capacity.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
