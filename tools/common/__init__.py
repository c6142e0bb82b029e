"""What several tools share. Importing it puts the repository on the path, so that a clone need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
