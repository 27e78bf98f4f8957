"""What a run leaves behind: a folder that standard tools load."""
