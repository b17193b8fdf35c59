use std::time::Duration;

use kmorph_actors::{Key, Strategy};
use kmorph_platform::MemoryRange;
use kmorph_platform::partition::PoolSource;

use super::*;
use crate::{PlatformChoice, export_policies, import_policies};

fn read(files: &[(&str, &str)]) -> (tempfile::TempDir, Result<Loaded, ConfigError>) {
    let d = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = d.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let paths = Paths { config: d.path().join("c.conf"), ..Paths::system() };
    let loaded = load(None, &paths);
    (d, loaded)
}

fn config(text: &str) -> Config {
    read(&[("c.conf", text)]).1.unwrap().config
}

#[test]
fn everything_has_a_default_and_can_be_set() {
    let default = Config::new(&Paths::system());
    for text in ["", "{}", "# nothing\n"] {
        assert_eq!(config(text), default, "{text:?}");
    }
    let c = config(
        "pool:\n  reserved: ['512M$0x40000000', '1G$4G']\nagent: /a\nmodules: [/m, /n]\nvsock-area: 16M\n\
         heartbeat:\n  timeout: 60s\n  pulse-period: 20ms\n  pulse-misses: 50\nrecovery:\n  boot-timeout: 30s\n  terminate-grace: 7s\n\
         metrics: null\nplatform: process\nprocess: {dir: /tmp/p, cpus: 8, memory: 1G}\nhistory: {keep-days: 9}\n",
    );
    assert_eq!(
        c.pool_source(),
        PoolSource::Reserved(vec![
            MemoryRange { base: 0x4000_0000, size: 512 << 20 },
            MemoryRange { base: 4 << 30, size: 1 << 30 }
        ])
    );
    let d = &c.settings.defaults;
    assert_eq!((d.heartbeat_timeout, d.boot_grace), (Duration::from_secs(60), Duration::from_secs(30)));
    assert_eq!((c.vsock_area, c.metrics, c.terminate_grace), (16 << 20, None, Duration::from_secs(7)));
    assert_eq!((c.platform, c.process.cpus, c.process.memory), (PlatformChoice::Process, 8, 1 << 30));
    assert_eq!(c.history.keep_days, Some(9));
    assert_eq!(config("pool:\n  offline: 256M\n").pool_source(), PoolSource::Offline(256 << 20));
}

#[test]
fn profiles_policies_and_groups() {
    let c = config(
        "profile: development\npolicy:\n  fence-tries: 5\n  auto-heal: off\npolicies:\n  web:\n    heartbeat-timeout: 0.5\n\
         groups:\n  - name: shop\n    strategy: rest-for-one\n    members: [db, web]\n    restart-period: 1m\n",
    );
    let d = &c.settings.defaults;
    assert_eq!((d.heartbeat_timeout, d.fence_tries, d.auto_heal), (Duration::from_secs(60), 5, false));
    assert_eq!(c.settings.policies["web"].get(Key::HeartbeatTimeout), Some("500ms"));
    let g = &c.settings.groups[0];
    assert_eq!((g.strategy, g.members.len(), g.period), (Strategy::RestForOne, 2, Duration::from_secs(60)));
}

#[test]
fn drop_ins_are_merged_key_by_key_and_every_value_knows_its_place() {
    let (d, loaded) = read(&[
        ("c.conf", "policy:\n  fence-tries: 5\n  vmcore: none\nmodules: [/a, /b]\n"),
        ("c.conf.d/20-more.conf", "policy:\n  fence-tries: 7\nmodules: [/c]\n"),
        ("c.conf.d/10-some.conf", "policy:\n  fence-tries: 6\n  boot-timeout: 9s\n"),
        ("c.conf.d/ignored.txt", "nonsense: ["),
    ]);
    let loaded = loaded.unwrap();
    let defaults = loaded.config.settings.defaults;
    assert_eq!((defaults.fence_tries, defaults.boot_grace), (7, Duration::from_secs(9)));
    assert_eq!(loaded.config.modules, [PathBuf::from("/c")]);
    let names: Vec<_> = loaded.files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["c.conf", "10-some.conf", "20-more.conf"]);
    let source = |key: &str| {
        let setting = loaded.settings.iter().find(|s| s.key == key).unwrap();
        setting.source.strip_prefix(d.path().to_str().unwrap()).unwrap().to_owned()
    };
    assert_eq!(source("policy.fence-tries"), "/c.conf.d/20-more.conf:2:16");
    assert_eq!(source("policy.boot-timeout"), "/c.conf.d/10-some.conf:3:17");
}

#[test]
fn every_mistake_is_named_with_file_line_column_key_and_what_is_allowed() {
    for (text, want) in [
        (
            "heartbeat:\n  timeuot: 5s\n",
            "c.conf:2:3: heartbeat.timeuot: there is no such key; there are timeout, pulse-period, pulse-misses",
        ),
        ("pool:\n  reserved: yes please\n", "c.conf:2:13: pool.reserved: this is a list"),
        ("pool:\n  offline: lots\n", "c.conf:2:12: pool.offline: \"lots\" is not a size; write 256M"),
        ("pool:\n  offline: 1M\n  reserved: ['64M$1G']\n", "pool: give reserved or offline, not both"),
        (
            "policy:\n  heartbeat-timeout: 1ms\n",
            "c.conf:2:22: policy.heartbeat-timeout: \"1ms\" is not possible; allowed: a time from 50ms to 24h",
        ),
        (
            "policy:\n  auto-heal: maybe\n",
            "c.conf:2:14: policy.auto-heal: \"maybe\" is not possible; allowed: enabled, disabled",
        ),
        ("policy:\n  restart-delay: 10m\n", "policy: restart-max-delay: 1m is less than restart-delay, 10m"),
        (
            "policies:\n  web:\n    vmcoer: none\n",
            "c.conf:3:5: policies.web.vmcoer: there is no such key; there are heartbeat-timeout",
        ),
        ("metrics: 0.0.0.0:1\n", "c.conf:1:10: metrics: 0.0.0.0:1 is not a loopback address"),
        ("profile: fast\n", "c.conf:1:10: profile: "),
        (
            "heartbeat:\n  timeout: 1s\npolicy:\n  heartbeat-timeout: 2s\n",
            "heartbeat.timeout: this is policy.heartbeat-timeout, which is given at",
        ),
        ("groups:\n  - members: [a]\n", "groups[0].name: a group needs a name"),
        ("groups:\n  - name: g\n    members: []\n", "groups[0].members: a group needs members"),
        (
            "groups:\n  - name: g\n    members: [a]\n  - name: h\n    members: [a]\n",
            "groups[1].members: a is in group g already, at",
        ),
        ("groups:\n  - name: g\n    members: [a]\n    strategy: all\n", "groups[0].strategy: "),
        ("pool: [", "c.conf:1:"),
        ("agent: [a]\n", "c.conf:1:8: agent: this is a single value"),
    ] {
        let (d, loaded) = read(&[("c.conf", text)]);
        let full = loaded.unwrap_err().full();
        let short = full.replace(&format!("{}/", d.path().display()), "");
        assert!(short.contains(want), "{text:?}:\n{short}\ndoes not contain\n{want}");
    }
    // All of them at once.
    let (_d, loaded) = read(&[("c.conf", "agnet: /a\nvsock-area: 3\nmetrics: here\n")]);
    assert_eq!(loaded.unwrap_err().problems.len(), 3);
}

#[test]
fn files_that_others_may_change_are_refused_with_the_way_out() {
    use std::os::unix::fs::PermissionsExt;
    let (d, loaded) = read(&[("c.conf", "{}"), ("c.conf.d/a.conf", "{}")]);
    loaded.unwrap();
    let paths = Paths { config: d.path().join("c.conf"), ..Paths::system() };
    for (name, mode) in [("c.conf.d/a.conf", "0644"), ("c.conf.d", "0755"), ("c.conf", "0644")] {
        let path = d.path().join(name);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let e = load(None, &paths).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Denied);
        let want = format!("others may write to it (0777): chmod {mode} {}", path.display());
        assert_eq!(e.to_string(), format!("{}: {want}", path.display()));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    load(None, &paths).unwrap();
}

#[test]
fn a_named_file_has_to_be_there() {
    let error = load(Some(Path::new("/nonexistent/k.conf")), &Paths::system()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(error.to_string().contains("/nonexistent/k.conf"), "{error}");
}

#[test]
fn what_is_exported_can_be_imported() {
    let all =
        import_policies("policies:\n  web:\n    auto-heal: false\n    heartbeat-timeout: 2\n", "f").unwrap();
    let text = export_policies(&all).unwrap();
    assert!(text.contains("auto-heal: disabled"), "{text}");
    assert_eq!(import_policies(&text, "f").unwrap(), all);
    assert!(import_policies("", "f").unwrap().is_empty());
    let error = import_policies("policies:\n  web:\n    auto-heal: 7\n", "my.yaml").unwrap_err();
    assert!(error.to_string().starts_with("my.yaml:3:16: policies.web.auto-heal: \"7\""), "{error}");
}

#[test]
fn what_needs_a_restart_is_known() {
    let old = config("agent: /a\n");
    let new = config("agent: /b\npolicy:\n  fence-tries: 9\nhistory: {keep-days: 3}\n");
    assert_eq!(old.restart_needed(&new), ["agent"]);
}

#[test]
fn every_example_in_the_manual_can_be_used() {
    let manual = include_str!("../../docs/operations.md");
    let examples: Vec<&str> =
        manual.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(examples.len() >= 3, "{examples:?}");
    for example in examples {
        let (_d, loaded) = read(&[("c.conf", example)]);
        loaded.map_err(|e| e.full()).unwrap();
    }
}
