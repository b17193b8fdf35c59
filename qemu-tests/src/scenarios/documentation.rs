//! Every command of the README and of docs/operations.md, executed as it stands there.

use std::time::Duration;

use super::Scenario;
use crate::Result;
use crate::guest::Guest;
use crate::host::MachineSpec;

pub const SCENARIO: Scenario = Scenario {
    name: "documentation",
    about: "every command in the README's and the operations manual's sh blocks, in their order",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(480),
};

const PAGES: [(&str, &str); 2] = [
    ("README.md", include_str!("../../../README.md")),
    ("docs/operations.md", include_str!("../../../docs/operations.md")),
];

/// Commands of the blocks marked `sh`.
fn commands(page: &str) -> Vec<&str> {
    let mut inside = false;
    let mut out = Vec::new();
    for line in page.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            l if inside && !l.trim().is_empty() => out.push(l),
            _ => {}
        }
    }
    out
}

fn guest(g: &Guest) -> Result<()> {
    g.define("web-server", 1, &[2], 128)?;
    g.define("database", 2, &[3], 128)?;
    for (name, page) in PAGES {
        g.chapter(name);
        let all = commands(page);
        g.check(all.len() >= 8, || format!("{name} has only {} commands", all.len()))?;
        for line in all {
            let done = g.command("/bin/busybox", &["sh", "-c", line])?;
            g.say(&format!("$ {line}: exit code {}", done.code));
            g.check(done.code == 0, || format!("{name}: {line}: {}{}", done.out, done.err))?;
        }
        g.check(g.online()? == "0-3", || format!("{name}: not all CPUs are back"))?;
    }
    g.kernel_is_clean()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_commands_of_sh_blocks_only() {
        let page = "x\n```sh\na b\n\nc\n```\n```\nno\n```\n    kmorphctl no\n";
        assert_eq!(commands(page), ["a b", "c"]);
    }
}
