"""Changes to a model folder."""

import json


def edit(folder, **changes):
    """Sets keys of its config.json, or takes out those that are to "drop"."""
    raw = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in (raw | changes).items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(kept))
