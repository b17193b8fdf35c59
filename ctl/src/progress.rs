//! What a morph is doing, for people who wait for it.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kmorph_control::{Client, MorphView, Request};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(150);

/// Do work that an instance is morphed by, and say on a terminal how far it is. Elsewhere nothing is said before the
/// end.
pub async fn shown<T>(instance: Option<&str>, socket: &Path, work: impl Future<Output = T>) -> T {
    let Some(name) = instance.filter(|_| std::io::stderr().is_terminal()) else { return work.await };
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        bar.set_style(style);
    }
    let looks = async {
        // Whoever cannot be asked is not asked again: the answer comes all the same.
        let Ok(mut client) = Client::connect(socket).await else { return };
        loop {
            tokio::time::sleep(LOOK).await;
            // There is none yet, or none any more.
            if let Ok(view) = client.call::<MorphView>(&Request::MorphStatus { name: name.to_owned() }).await
            {
                bar.set_message(line(&view));
            }
            bar.tick();
        }
    };
    tokio::pin!(work);
    let early = tokio::select! {
        done = &mut work => Some(done),
        () = looks => None,
    };
    let done = match early {
        Some(done) => done,
        None => work.await,
    };
    bar.finish_and_clear();
    done
}

/// One line of a morph under way.
fn line(m: &MorphView) -> String {
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    let mut line = m.state.clone();
    if let Some(t) = &m.transfer {
        line += &format!(", {} rounds, {:.1} MiB", t.rounds, mib(t.bytes));
        match t.round_bytes {
            0 if t.mib_per_s > 0.0 => line += &format!(", {:.0} MiB/s in the latest", t.mib_per_s),
            0 => {}
            bytes => {
                line += &format!("; {:.1} MiB of the next, {:.0} MiB/s", mib(bytes), t.round_mib_per_s);
            }
        }
        if t.throttled_percent > 0 {
            line += &format!(", throttled by {} %", t.throttled_percent);
        }
    }
    if let Some(step) = m.steps.last() {
        line += &format!(": {}", step.detail);
    }
    line
}

#[cfg(test)]
mod tests {
    use kmorph_control::views::{MorphStep, TransferView};

    use super::*;

    #[test]
    fn a_line_has_phase_rounds_bytes_and_rate() {
        let step =
            MorphStep { state: "MORPH_PREPARING".into(), at_ms: 3, detail: "starting the new kernel".into() };
        let mut m = MorphView { state: "MORPH_PREPARING".into(), steps: vec![step], ..MorphView::default() };
        assert_eq!(line(&m), "MORPH_PREPARING: starting the new kernel");
        (m.state, m.steps) = ("MORPH_TRANSFERRING".into(), vec![]);
        let t = TransferView { round_bytes: 3 << 20, round_mib_per_s: 40.4, ..TransferView::default() };
        m.transfer = Some(t);
        assert_eq!(line(&m), "MORPH_TRANSFERRING, 0 rounds, 0.0 MiB; 3.0 MiB of the next, 40 MiB/s");
        let t = TransferView {
            rounds: 2,
            bytes: 9 << 20,
            mib_per_s: 25.0,
            throttled_percent: 60,
            ..Default::default()
        };
        m.transfer = Some(t);
        assert_eq!(
            line(&m),
            "MORPH_TRANSFERRING, 2 rounds, 9.0 MiB, 25 MiB/s in the latest, throttled by 60 %"
        );
    }
}
