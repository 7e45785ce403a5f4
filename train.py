"""One run, or with -m a sweep: python train.py [-m] key=value ..."""

import signal
import sys

from clbench.streams import begin

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to save, Ctrl-C just ends it
if __name__ == "__main__":
    begin()

from clbench.commands.run import main

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
