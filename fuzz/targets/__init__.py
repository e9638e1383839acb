"""One module for each reader: `one(data)` holds the law of `fuzz.law` for these bytes, and is true if it took them."""
