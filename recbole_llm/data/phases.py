"""What a row of a split is for: the numbers of the phases, and their names."""

TRAIN, VALID, TEST, DROPPED, WITHHELD = 0, 1, 2, 3, 4
PHASES = ("train", "valid", "test")
PHASE_NAMES = {TRAIN: "train", VALID: "valid", TEST: "test", WITHHELD: "withheld"}
