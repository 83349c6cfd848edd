"""Speed, memory and error of the losses, measured side by side in one process."""
