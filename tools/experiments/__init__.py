"""Studies that answered one question each: kept to be read and run again, and not tested."""
