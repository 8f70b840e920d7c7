"""Speed and memory by length: `lra bench`. Each cell is measured in a fresh process."""
