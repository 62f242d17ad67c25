"""Changes to a model folder."""

import json


def edit(folder, **changes):
    """Sets keys of config.json; the value "drop" removes a key."""
    raw = json.loads((folder / "config.json").read_text())
    remaining = {name: value for name, value in (raw | changes).items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(remaining))
