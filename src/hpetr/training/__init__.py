"""Training by recipes: images (`data`), steps (`optimizer`, `trainer`), the run's folder (`run`), `report`."""
