//! Every instance knows where the others are.

use kmp::message::{Neighbour, Topology};

use super::morphs::{again, at_rest, on, to};
use super::*;

impl World {
    /// What a kernel was told, once that is so.
    async fn told(&self, id: u16, incarnation: u64, so: impl Fn(&Topology) -> bool) -> Topology {
        let limit = Instant::now() + PATIENCE;
        loop {
            let told = self.fake.workloads.told((InstanceId(id), incarnation));
            if so(&told) {
                return told;
            }
            assert!(Instant::now() < limit, "{id} was told {told:?}");
            self.pass(MS).await;
        }
    }
}

fn of<'a>(told: &'a Topology, name: &str) -> &'a Neighbour {
    static NOBODY: std::sync::LazyLock<Neighbour> = std::sync::LazyLock::new(Neighbour::default);
    told.instances.iter().find(|i| i.name == name).unwrap_or(&NOBODY)
}

#[tokio::test(start_paused = true)]
async fn neighbours_are_told_of_starts_failures_and_morphs() {
    let w = world().await;
    w.up("db").await;
    w.up("web").await;
    let told = w.told(2, 1, |t| of(t, "web").serves && of(t, "db").serves).await;
    let web = of(&told, "web");
    assert_eq!((web.id, web.cid, web.cpus.as_slice()), (1, 3, &[2, 3][..]));
    assert_eq!((web.release.as_str(), web.memory_bytes >> 20), ("6.12.9", 512));
    w.told(1, 1, |t| *t == told).await;

    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("boot", &[Next::Block(gate.clone())]);
    w.fake.panic(1, "die").await;
    w.told(2, 1, |t| !of(t, "web").serves).await;
    gate.notify_one();
    w.told(2, 1, |t| of(t, "web").serves && of(t, "web").incarnation == 2).await;

    // Before the commit the new kernel is nobody's neighbour; it is told, too.
    w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    let told = w.told(511, 3, |t| of(t, "web").serves).await;
    assert_eq!((told.instances.len(), of(&told, "web").id), (2, 1));
    w.tree.morph(on(MorphGoal::Commit)).await.unwrap();
    at_rest(&w, 511).await;
    let told = w.told(2, 1, |t| of(t, "web").cid == 513 && of(t, "web").serves).await;
    assert_eq!((of(&told, "web").release.as_str(), of(&told, "web").incarnation), ("6.18.1", 3));

    // The next daemon tells it anew.
    let w = again(w).await;
    w.told(2, 1, |t| t.generation < told.generation && of(t, "web").cid == 513 && of(t, "web").serves).await;
    w.tree.terminate("web", true).await.unwrap();
    w.told(2, 1, |t| !of(t, "web").serves).await;
}

#[tokio::test(start_paused = true)]
async fn a_definition_that_cannot_follow_is_said() {
    let w = world().await;
    w.up("web").await;
    w.tree.morph(to(MorphGoal::Commit)).await.unwrap();
    at_rest(&w, 511).await;
    let said = w.tree.env_for_test().log.since(&EventsArgs::default());
    let said = said.iter().find(|e| e.cause.contains("definitions cannot be written here"));
    assert!(said.is_some_and(|e| e.effect.contains("terminate web")), "{said:?}");
}
