"""Where page copies outlive the process: files, servers, and what plug-ins know."""
