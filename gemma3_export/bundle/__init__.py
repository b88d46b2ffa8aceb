"""The exported folder: manifest, graph signature, quantised block formats, inspection."""
