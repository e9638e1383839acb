"""What training saved, whoever wrote it: folders, files and keys, as PEFT would have written them."""
