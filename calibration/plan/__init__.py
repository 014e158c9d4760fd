"""Plans what happens to every tensor; a run executes the plan and a verification checks it."""
