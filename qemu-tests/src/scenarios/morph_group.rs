//! The members of a group get a new kernel together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use kmorph_control::InstanceState;
use tokio::time::{Instant, sleep};

use super::switch::{ADDRESS, question};
use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "morph-group",
    about: "two members of a group go from 6.1 to 6.12 together or not at all, and back one by one, their clients elsewhere",
    in_run: true,
    machine: || MachineSpec { cpus: 6, cmdline: "memmap=768M$0x40000000", ..MachineSpec::default() },
    guest,
    limit: Duration::from_secs(480),
};

/// Between the questions of a client.
const PACE: Duration = Duration::from_millis(10);
const GROUP: &str = "groups:\n  - name: shop\n    strategy: rest-for-one\n    members: [database, web]\n";

fn guest(g: &Guest) -> Result<()> {
    g.define("database", 1, &[1], 128)?;
    g.define("web", 2, &[2], 128)?;
    g.configure(&format!("{OFTEN}{GROUP}"))?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    let publish = format!("--publish=tcp:{ADDRESS}=vsock:{}", tool::PORT);
    for name in ["database", "web"] {
        g.ctl(&["spawn", name, "--kernel=/boot/vmlinuz-6.1", &initramfs, &publish])?;
    }
    g.define("stranger", 3, &[3], 128)?;
    let stranger = ["spawn", "stranger", "--kernel=/boot/vmlinuz-6.1", &initramfs, &publish];
    g.ctl_fails(&stranger, 5, &["in use", "only members of one group"])?;
    let free = g.daemon()?.pool_free_bytes;

    g.chapter("one new kernel dies before the commit: nobody gets one");
    g.ctl(&["morph", "group", "shop", "--kernel=/boot/vmlinuz-6.12"])?;
    g.tool(g.status("web~morph")?.cid, "crash")?;
    undone(g, "web")?;
    g.ctl_fails(&["morph", "group", "shop", "--commit"], 4, &["web has no morph", "--rollback"]).map(drop)?;
    g.ctl(&["morph", "group", "shop", "--rollback"])?;
    run(g, "6.1.", free)?;

    g.chapter("both are valid, and are committed");
    g.ctl(&["morph", "group", "shop", "--kernel=/boot/vmlinuz-6.12"])?;
    g.ctl(&["morph", "group", "shop", "--commit"])?;
    run(g, "6.12.", free)?;
    g.ctl(&["group", "show", "shop"])?;

    g.chapter("both serve at one address; one by one they go back, and nobody is refused");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let client = g.beside(async move {
        let (mut answers, mut longest) = (BTreeMap::<String, u64>::new(), Duration::ZERO);
        while !stopped.load(Ordering::Relaxed) {
            let began = Instant::now();
            let answer = question().await?;
            longest = longest.max(began.elapsed());
            let release = answer.split(' ').next().unwrap_or_default().to_owned();
            *answers.entry(release).or_default() += 1;
            sleep(PACE).await;
        }
        Result::Ok((answers, longest))
    });
    g.ctl(&["morph", "group", "shop", "--kernel=/boot/vmlinuz-6.1", "--one-by-one"])?;
    stop.store(true, Ordering::Relaxed);
    let (answers, longest) = g.wait(client).context("the client")??;
    g.say(&format!("answered by {answers:?}, none lost; the longest question took {longest:.1?}"));
    g.check(answers.len() == 2, || format!("answered by {answers:?}"))?;
    run(g, "6.1.", free)?;
    let views = [g.status("database")?, g.status("web")?];
    let failed: u64 = views.iter().flat_map(|v| &v.publish).map(|p| p.failed).sum();
    g.check(failed == 0, || format!("connections were lost: {views:?}"))?;

    g.chapter("one member crashes: clients go to the other meanwhile");
    let before = g.status("web")?;
    g.tool(before.cid, "crash")?;
    let began = Instant::now();
    let mut asked = 0;
    loop {
        let web = g.status("web")?;
        if web.state == InstanceState::Healthy && web.incarnation > before.incarnation {
            break;
        }
        // Until its end is known clients are sent to it, and what it took dies with it.
        if web.state != InstanceState::Healthy {
            g.wait(question())?;
            asked += 1;
        }
        g.check(began.elapsed() < Duration::from_secs(60), || "web is not healed".into())?;
    }
    g.check(asked > 0, || "nothing was asked".into())?;
    g.say(&format!("{asked} questions were answered until web was back"));
    run(g, "6.1.", free)?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-5", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

fn undone(g: &Guest, name: &str) -> Result<()> {
    let until = SystemTime::now() + Duration::from_secs(30);
    while g.status(name)?.morph.is_some() {
        g.check(SystemTime::now() < until, || format!("the morph of {name} is not undone"))?;
        g.pause(Duration::from_millis(50));
    }
    Ok(())
}

/// Both run this release, and nothing is left of a morph.
fn run(g: &Guest, release: &str, free: u64) -> Result<()> {
    for name in ["database", "web"] {
        let v = g.healthy(name)?;
        g.check(v.release.starts_with(release) && v.morph.is_none(), || format!("{v:?}"))?;
    }
    let d = g.daemon()?;
    g.check(d.running == 2 && d.pool_free_bytes == free, || format!("something is left: {d:?}"))
}
