"""The zoo: models by name, as constructors to call later; and models built without values, or with values in mapped files."""
