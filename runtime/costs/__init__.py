"""How long a layer takes in each form: measured on this machine, remembered, and forecast."""
