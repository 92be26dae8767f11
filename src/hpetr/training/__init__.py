"""The parts of a training run: what it reads (`data`), how it steps (`optimizer`, `trainer`), its folder (`run`)."""
