"""Collection of one person's choices: the web page and the file of choices."""
